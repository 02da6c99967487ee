#!/bin/bash
# DeeperCluster, VGG-16 with Sobel filters, 96 million images of YFCC100M, 320,000 clusters, each in 4 rotations.
#
#   export DATASET_PATH='/data/yfcc100m/shard-{000000..009999}.tar' EXPERIMENT_PATH=runs/deepercluster
#   export ROTNET=runs/rotnet_vgg16   # the run of scripts/rotnet_vgg16_pretrain.sh, or released weights
#   sbatch scripts/deepercluster_vgg16_pretrain.sh
#
# hardware: 8 nodes of 8 GPUs; published on 64 GPUs. Whitened features take 1.6 TB below EXPERIMENT_PATH
#           for each of up to two files while clustering; it must be a folder that all nodes share
# time:     k-means: 1 and 4 minutes an iteration at the two levels (thesis, section 3.3.1)
# expected: 45.6 % top-1, linear classifier on conv13, ImageNet; 73.0 % mAP on VOC07 (thesis, Table 3.3)
# The values are those of the authors' main.sh; their batch norm too is shared by all processes. They assign
# with faiss, which computes what ours does.
# Submit from the repository's folder, with the environment active. Two minutes before the time limit the
# job gets SIGUSR1, saves, and is requeued. Further flags can be appended to the command above.

#SBATCH --nodes=8
#SBATCH --gpus=64
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --job-name=deepercluster_vgg16_pretrain
#SBATCH --time=72:00:00
#SBATCH --mem=450G
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -eu
: "${DATASET_PATH:?set it to a folder of images, or to tar shards}"
: "${ROTNET:?set it to a run of main_rotnet.py, or to its weights}"
: "${EXPERIMENT_PATH:?set it to the folder of the run}"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

srun --label --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    python -u main_deepercluster.py \
    --data_path "$DATASET_PATH" --dump_path "$EXPERIMENT_PATH" --pretrained "$ROTNET" \
    --size_dataset 100000000 --workers 7 --arch vgg16 --sobel true --sync_bn pytorch --syncbn_process_group_size 0 \
    --lr 0.1 --wd 0.00001 --nepochs 100 --batch_size 48 --reassignment 3 --dim_pca 4096 \
    --super_classes 16 --rotnet true --k 320000 --warm_restart false --niter 10 \
    "$@"
