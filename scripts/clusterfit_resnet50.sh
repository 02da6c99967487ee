#!/bin/bash
# ClusterFit, ResNet-50, 16,000 clusters of a trained network's features, 105 epochs, batches of 256.
#
#   export DATASET_PATH=/data/imagenet/train EXPERIMENT_PATH=runs/clusterfit_resnet50
#   export TEACHER=runs/rotnet_resnet50
#   sbatch scripts/clusterfit_resnet50.sh
#
# hardware: 1 node of 8 GPUs, as published
# time:     not published
# expected: 53.6 % top-1, linear classifier on ImageNet, from a RotNet with a ResNet-50 (VISSL's model zoo)
# The values are those of VISSL's two configurations, cluster_features_resnet_8gpu_rotation_in1k and
# clusterfit_resnet_8gpu_imagenet; main_clusterfit.py says what differs. TEACHER is a run of any method of
# this repository, a released file, or with --teacher_arch torchvision weights.
# Memory and time limit are ours. Submit from the repository's folder, with the environment active. Two
# minutes before the time limit the job gets SIGUSR1, saves, and is requeued. Further flags can be appended
# to the command above.

#SBATCH --nodes=1
#SBATCH --gpus=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --job-name=clusterfit_resnet50
#SBATCH --time=72:00:00
#SBATCH --mem=450G
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -eu
: "${DATASET_PATH:?set it to the ImageNet folder}"
: "${EXPERIMENT_PATH:?set it to the folder of the run}"
: "${TEACHER:?set it to the folder of a run or a file of weights}"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

srun --label --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    python -u main_clusterfit.py \
    --data_path "$DATASET_PATH" --dump_path "$EXPERIMENT_PATH" --pretrained "$TEACHER" \
    --nmb_cluster 16000 --niter 50 --arch resnet50 \
    --epochs 105 --batch_size 32 --lr 0.1 --decay_epochs 30 60 90 100 --gamma 0.1 --wd 0.0001 \
    --precision fp32 --sync_bn none --workers 5 --checkpoint_freq 5 --checkpoint_iters 1000 \
    "$@"
