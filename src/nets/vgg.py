"""VGG-16 with batch norm, as DeepCluster and DeeperCluster train it.

Simonyan & Zisserman 2015, arXiv:1409.1556, configuration D; Caron et al. 2018, arXiv:1807.05520,
and 2019, arXiv:1905.01278. The names of parameters are those of the released checkpoints.
"""

from torch import nn

from .top_layer import POOL, PlainNetwork


class VGG16(PlainNetwork):
    """Made for images of 224 px, and takes others from 32 px on; see PlainNetwork."""

    convolutions = (
        *((64, 3, 1, 1), (64, 3, 1, 1), POOL),
        *((128, 3, 1, 1), (128, 3, 1, 1), POOL),
        *((256, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1), POOL),
        *((512, 3, 1, 1), (512, 3, 1, 1), (512, 3, 1, 1), POOL) * 2,
    )
    pool, cells, smallest = (2, 2), 7, 32

    @staticmethod
    def linear_layers(inputs: int, num_features: int, dropout: float) -> list[nn.Module]:
        return [
            nn.Linear(inputs, num_features),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(num_features, num_features),
        ]
