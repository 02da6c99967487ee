#!/bin/bash
# DeepCluster-v2, ResNet-50, 400 epochs, 2x160 + 4x96 crops, batches of 4096 images.
#
#   export DATASET_PATH=/data/imagenet/train EXPERIMENT_PATH=runs/deepclusterv2_400ep
#   sbatch scripts/deepclusterv2_400ep_pretrain.sh
#
# hardware: 8 nodes of 8 GPUs; published on 64 V100 of 16 GB
# time:     about 21 h 30 min (authors' table: 3 min 13 s an epoch)
# expected: 74.3 % top-1, linear classifier on ImageNet (authors' table of models)
# The values are those of the published script, which trains in float32 (--precision auto: in bf16), but
# for --sync_bn pytorch: the same over groups of 8, and no apex to build.
# Submit from the repository's folder, with the environment active. Two minutes before the time limit the
# job gets SIGUSR1, saves, and is requeued. Further flags can be appended to the command above.

#SBATCH --nodes=8
#SBATCH --gpus=64
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --job-name=deepclusterv2_400ep_pretrain
#SBATCH --time=25:00:00
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
    python -u main_deepclusterv2.py \
    --data_path "$DATASET_PATH" --dump_path "$EXPERIMENT_PATH" \
    --nmb_crops 2 4 --size_crops 160 96 --min_scale_crops 0.08 0.05 --max_scale_crops 1. 0.14 \
    --crops_for_assign 0 1 --temperature 0.1 --feat_dim 128 \
    --nmb_prototypes 3000 3000 3000 --freeze_prototypes_niters 300000 \
    --epochs 400 --batch_size 64 --base_lr 4.8 --final_lr 0.0048 --wd 0.000001 \
    --warmup_epochs 10 --start_warmup 0.3 \
    --arch resnet50 --precision fp32 --sync_bn pytorch \
    "$@"
