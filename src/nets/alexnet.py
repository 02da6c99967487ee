"""AlexNet with batch norm, as DeepCluster trains it (Caron et al. 2018, arXiv:1807.05520, 3.3).

Krizhevsky et al. 2012 in one column of five convolutions, with batch norm in the place of local
response normalisation. The names of parameters are those of the released checkpoints.
"""

from torch import nn

from .top_layer import POOL, PlainNetwork


class AlexNet(PlainNetwork):
    """Made for images of 224 px, and takes others from 63 px on; see PlainNetwork."""

    convolutions = (
        *((96, 11, 4, 2), POOL),
        *((256, 5, 1, 2), POOL),
        *((384, 3, 1, 1), (384, 3, 1, 1), (256, 3, 1, 1), POOL),
    )
    pool, cells, smallest = (3, 2), 6, 63

    @staticmethod
    def linear_layers(inputs: int, num_features: int, dropout: float) -> list[nn.Module]:
        return [
            nn.Dropout(dropout),
            nn.Linear(inputs, num_features),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(num_features, num_features),
        ]
