#!/bin/bash
# DeepCluster, AlexNet with Sobel filters, ImageNet, 10,000 clusters, batches of 256 images.
#
#   export DATASET_PATH=/data/imagenet/train EXPERIMENT_PATH=runs/deepcluster_alexnet
#   sbatch scripts/deepcluster_alexnet_pretrain.sh
#
# hardware: 1 GPU; published on one P100
# time:     12 days for 500 epochs there (thesis, section 3.2.1)
# expected: 72.0 and 73.7 % mAP on VOC07, FC6-8 and ALL (thesis, Table 3.1; here eval_voc07.py)
# Submit from the repository's folder, with the environment active. Two minutes before the time limit the
# job gets SIGUSR1, saves, and is requeued. Further flags can be appended to the command above.

#SBATCH --nodes=1
#SBATCH --gpus=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --job-name=deepcluster_alexnet_pretrain
#SBATCH --time=240:00:00
#SBATCH --mem=120G
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
    python -u main_deepcluster.py \
    --data_path "$DATASET_PATH" --dump_path "$EXPERIMENT_PATH" \
    --arch alexnet --sobel --clustering Kmeans --k 10000 --reassign 1 \
    --epochs 500 --batch 256 --lr 0.05 --wd -5 --workers 7 --verbose \
    "$@"
