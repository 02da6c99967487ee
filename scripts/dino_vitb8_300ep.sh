#!/bin/bash
# DINO, ViT-B/8, 300 epochs, 2x224 + 10x96 crops, batches of 1056 images.
#
#   export DATASET_PATH=/data/imagenet/train EXPERIMENT_PATH=runs/dino_vitb8_300ep
#   sbatch scripts/dino_vitb8_300ep.sh
#
# hardware: 22 nodes of 8 GPUs; published on 176 GPUs (args.txt, see below)
# time:     not published
# expected: 77.4 % k-NN, 80.1 % linear classifier, top-1 on ImageNet (thesis, Table 5.2)
# The values are those of the released model's args.txt, as two public repositories quote it alike, the
# number of GPUs as one of them does; the file itself was not read
# (dl.fbaipublicfiles.com/dino/dino_vitbase8_pretrain/args.txt).
# Nodes, memory and time limit are ours. Submit from the repository's folder, with the environment
# active. Two minutes before the time limit the job gets SIGUSR1, saves, and is requeued. Further
# flags can be appended to the command above.

#SBATCH --nodes=22
#SBATCH --gpus=176
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=10
#SBATCH --job-name=dino_vitb8_300ep
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
    --global_crops_scale 0.25 1. --local_crops_number 10 --local_crops_scale 0.05 0.25 \
    --teacher_temp 0.07 --warmup_teacher_temp 0.03 --warmup_teacher_temp_epochs 50 \
    --momentum_teacher 0.996 \
    --out_dim 65536 --norm_last_layer true --use_bn_in_head false \
    --epochs 300 --batch_size 6 --optimizer adamw --lr 0.0005 --min_lr 0.000002 --warmup_epochs 10 \
    --weight_decay 0.04 --weight_decay_end 0.4 --clip_grad 3.0 --freeze_last_layer 3 \
    --arch vit_base --patch_size 8 --drop_path_rate 0.1 --use_fp16 false --seed 0 \
    "$@"
