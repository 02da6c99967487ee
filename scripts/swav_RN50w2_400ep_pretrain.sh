#!/bin/bash
# SwAV, ResNet-50 of twice the width, 400 epochs, 2x224 + 4x96 crops, batches of 4096 images.
#
#   export DATASET_PATH=/data/imagenet/train EXPERIMENT_PATH=runs/swav_RN50w2_400ep
#   sbatch scripts/swav_RN50w2_400ep_pretrain.sh
#
# hardware: 16 nodes of 8 GPUs; published on 128 GPUs of 32 GB (paper, appendix B.2)
# time:     not in the paper
# expected: 77.3 % top-1, linear classifier on ImageNet (paper, Table 5)
# The values are those of the published script, but for --sync_bn pytorch: the same over groups of 8,
# and no apex to build (--sync_bn apex works where it is installed).
# Submit from the repository's folder, with the environment active. Two minutes before the time limit the
# job gets SIGUSR1, saves, and is requeued. Further flags can be appended to the command above.

#SBATCH --nodes=16
#SBATCH --gpus=128
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=10
#SBATCH --job-name=swav_RN50w2_400ep_pretrain
#SBATCH --time=72:00:00
#SBATCH --mem=450G
#SBATCH --constraint=volta32gb
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
    python -u main_swav.py \
    --data_path "$DATASET_PATH" --dump_path "$EXPERIMENT_PATH" \
    --nmb_crops 2 4 --size_crops 224 96 --min_scale_crops 0.14 0.05 --max_scale_crops 1. 0.14 \
    --crops_for_assign 0 1 \
    --temperature 0.1 --epsilon 0.05 --sinkhorn_iterations 3 --feat_dim 128 \
    --nmb_prototypes 3000 \
    --queue_length 0 --freeze_prototypes_niters 313 \
    --epochs 400 --batch_size 32 --base_lr 4.8 --final_lr 0.0048 --wd 0.000001 \
    --warmup_epochs 10 --start_warmup 0.3 \
    --arch resnet50w2 --hidden_mlp 8192 --use_fp16 true --sync_bn pytorch \
    "$@"
