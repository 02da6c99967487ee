#!/bin/bash
# DINO, ResNet-50, 800 epochs, 2x224 + 6x96 crops, batches of 4080 images.
#
#   export DATASET_PATH=/data/imagenet/train EXPERIMENT_PATH=runs/dino_resnet50_800ep
#   sbatch scripts/dino_resnet50_800ep.sh
#
# hardware: 10 nodes of 8 GPUs; published on 80 GPUs (authors, dino issue 133)
# time:     not published
# expected: 67.5 % k-NN, 75.3 % linear classifier, top-1 on ImageNet (thesis, Table 5.2)
# The batch of 4080 on 80 GPUs is the authors' own word, dino issue 133. The rest is the released
# model's args.txt as one public repository quotes it; the file itself was not read
# (dl.fbaipublicfiles.com/dino/dino_resnet50_pretrain/args.txt). Batch norm is that of all GPUs.
# Nodes, memory and time limit are ours. Submit from the repository's folder, with the environment
# active. Two minutes before the time limit the job gets SIGUSR1, saves, and is requeued. Further
# flags can be appended to the command above.

#SBATCH --nodes=10
#SBATCH --gpus=80
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=10
#SBATCH --job-name=dino_resnet50_800ep
#SBATCH --time=72:00:00
#SBATCH --mem=450G
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -eu
: "${DATASET_PATH:?set it to the ImageNet folder}"
: "${EXPERIMENT_PATH:?set it to the folder of the run}"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

srun --label --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    python -u main_dino.py \
    --data_path "$DATASET_PATH" --dump_path "$EXPERIMENT_PATH" \
    --global_crops_scale 0.14 1. --local_crops_number 6 --local_crops_scale 0.05 0.14 \
    --teacher_temp 0.07 --warmup_teacher_temp 0.04 --warmup_teacher_temp_epochs 50 \
    --momentum_teacher 0.996 \
    --out_dim 60000 --norm_last_layer true --use_bn_in_head true \
    --epochs 800 --batch_size 51 --optimizer lars --lr 0.3 --min_lr 0.0048 --warmup_epochs 10 \
    --weight_decay 0.000001 --weight_decay_end 0.000001 --clip_grad 0 --freeze_last_layer 1 \
    --arch resnet50 --sync_bn pytorch --syncbn_process_group_size 0 --use_fp16 false --seed 0 \
    "$@"
