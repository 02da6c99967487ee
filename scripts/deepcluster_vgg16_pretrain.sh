#!/bin/bash
# DeepCluster, VGG-16 with batch norm and Sobel filters, ImageNet, 10,000 clusters, batches of 256 images.
#
#   export DATASET_PATH=/data/imagenet/train EXPERIMENT_PATH=runs/deepcluster_vgg16
#   sbatch scripts/deepcluster_vgg16_pretrain.sh
#
# hardware: 1 node of 8 GPUs; the authors' script splits the batch over the GPUs of a machine
# time:     not published
# expected: 48.4 % top-1, linear classifier on conv13, ImageNet; 71.9 % mAP on VOC07 (thesis, Table 3.3)
# The authors' one script is for both networks: the flags are those of AlexNet's run.
# Submit from the repository's folder, with the environment active. Two minutes before the time limit the
# job gets SIGUSR1, saves, and is requeued. Further flags can be appended to the command above.

#SBATCH --nodes=1
#SBATCH --gpus=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --job-name=deepcluster_vgg16_pretrain
#SBATCH --time=240:00:00
#SBATCH --mem=400G
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
    --arch vgg16 --sobel --clustering Kmeans --k 10000 --reassign 1 \
    --epochs 200 --batch 32 --lr 0.05 --wd -5 --workers 7 --verbose \
    "$@"
