#!/bin/bash
# SwAV with small batches: ResNet-50, 400 epochs, 2x224 + 6x96 crops, 256 images, queue of 3840.
#
#   export DATASET_PATH=/data/imagenet/train EXPERIMENT_PATH=runs/swav_400ep_bs256
#   sbatch scripts/swav_400ep_bs256_pretrain.sh
#
# hardware: 1 node of 4 GPUs; published on 4 GPUs
# time:     about 348 h (authors: 52 min 10 s an epoch): five jobs of 72 h, requeued by themselves
# expected: 74.3 % top-1, linear classifier on ImageNet (paper, Table 3)
# The values are those of the published script.
# Submit from the repository's folder, with the environment active. Two minutes before the time limit the
# job gets SIGUSR1, saves, and is requeued. Further flags can be appended to the command above.

#SBATCH --nodes=1
#SBATCH --gpus=4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --job-name=swav_400ep_bs256_pretrain
#SBATCH --time=72:00:00
#SBATCH --mem=150G
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
    --nmb_crops 2 6 --size_crops 224 96 --min_scale_crops 0.14 0.05 --max_scale_crops 1. 0.14 \
    --crops_for_assign 0 1 \
    --temperature 0.1 --epsilon 0.05 --sinkhorn_iterations 3 --feat_dim 128 \
    --nmb_prototypes 3000 \
    --queue_length 3840 --epoch_queue_starts 15 --freeze_prototypes_niters 5005 \
    --epochs 400 --batch_size 64 --base_lr 0.6 --final_lr 0.0006 --wd 0.000001 --warmup_epochs 0 \
    --arch resnet50 --use_fp16 true --sync_bn pytorch \
    "$@"
