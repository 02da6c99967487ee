#!/bin/bash
# RotNet, VGG-16 with batch norm under Sobel filters: the network that DeeperCluster starts from.
#
#   export DATASET_PATH=/data/yfcc100m EXPERIMENT_PATH=runs/rotnet_vgg16
#   sbatch scripts/rotnet_vgg16_pretrain.sh
#
# hardware: 8 nodes of 8 GPUs; published on 64 GPUs (thesis, section 3.3.1)
# time:     not published
# expected: 33.0 % top-1, linear classifier on ImageNet; trained on YFCC100M (thesis, Table 3.3)
# The values are the defaults of DeeperCluster's main.py and README.md, which say how RotNet is run: 48
# crops per GPU, here 12 images in four rotations, a constant learning rate of 0.1, weight decay 1e-5,
# batch norm over all GPUs. For how many epochs the released model was trained is not published; 100 is
# the default. Nodes, memory and time limit are ours.
# Submit from the repository's folder, with the environment active. Two minutes before the time limit the
# job gets SIGUSR1, saves, and is requeued. Further flags can be appended to the command above.

#SBATCH --nodes=8
#SBATCH --gpus=64
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --job-name=rotnet_vgg16_pretrain
#SBATCH --time=72:00:00
#SBATCH --mem=450G
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -eu
: "${DATASET_PATH:?set it to the folder of images, labels are not needed}"
: "${EXPERIMENT_PATH:?set it to the folder of the run}"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

srun --label --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    python -u main_rotnet.py \
    --data_path "$DATASET_PATH" --dump_path "$EXPERIMENT_PATH" \
    --arch vgg16 --sobel true --sobel_padding 2 \
    --epochs 100 --batch_size 12 --lr 0.1 --decay_epochs --wd 0.00001 \
    --precision fp32 --sync_bn pytorch --syncbn_process_group_size 0 \
    --workers 8 --checkpoint_freq 1 --checkpoint_iters 5000 \
    "$@"
