"""ResNet-20 for CIFAR-10 with quantizable residual stages."""

from numbers import Integral

import torch.nn as nn

from arguments import COUNT, check
from FP_layers import FP_Conv, FP_Linear, MinMax


class ResNet_Block(nn.Module):
    """Basic residual block: two 3x3 convolutions and a shortcut, ReLU after their sum.

    Maps (N, in_chs, H, W) to (N, out_chs, H/strides, W/strides). The shortcut (`id_mapping`) is the
    identity where shapes agree, else a 1x1 convolution and a BatchNorm (He et al., 2016, option B).
    Nbits, symmetric and quantizer apply to all convolutions of the block; see FP_layers.FP_Conv.
    """

    def __init__(self, in_chs, out_chs, strides, Nbits=None, symmetric=False, quantizer=MinMax):
        super().__init__()
        fixed_point = {"Nbits": Nbits, "symmetric": symmetric, "quantizer": quantizer}
        self.conv1 = nn.Sequential(
            FP_Conv(
                in_chs, out_chs, kernel_size=3, stride=strides, padding=1, bias=False, **fixed_point
            ),
            nn.BatchNorm2d(out_chs),
            nn.ReLU(inplace=True),
        )
        self.conv2 = nn.Sequential(
            FP_Conv(
                out_chs, out_chs, kernel_size=3, stride=1, padding=1, bias=False, **fixed_point
            ),
            nn.BatchNorm2d(out_chs),
        )
        if strides == 1 and in_chs == out_chs:
            self.id_mapping = nn.Identity()
        else:
            self.id_mapping = nn.Sequential(
                FP_Conv(
                    in_chs, out_chs, kernel_size=1, stride=strides, padding=0, bias=False,
                    **fixed_point
                ),
                nn.BatchNorm2d(out_chs),
            )
        self.final_activation = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.final_activation(self.conv2(self.conv1(x)) + self.id_mapping(x))


class ResNetCIFAR(nn.Module):
    """ResNet for CIFAR-10: (N, 3, 32, 32) normalized pixels to (N, 10) logits.

    num_layers is 6n + 2 (20 gives 272,474 parameters): a 3x3 convolution, three stages of n blocks
    with `width`, 2 * width and 4 * width channels, global average pooling and a linear layer.
    Nbits, symmetric and quantizer (see FP_layers.FP_Conv) apply to the stages, their 1x1
    projections included; the first convolution and the last layer always stay float.

    Raises ValueError if num_layers is not 6n + 2 with n >= 1 or width not a positive integer, and
    as FP_layers.FP_Conv does.
    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
    """

    def __init__(self, num_layers=20, Nbits=None, symmetric=False, quantizer=MinMax, width=16):
        super().__init__()
        if not isinstance(num_layers, Integral) or num_layers not in range(8, 10_000, 6):
            raise ValueError(
                f"num_layers must be 6n + 2 with n >= 1 (8, 14, 20, ...) and below 10,000, "
                f"got {num_layers!r}"
            )
        check(COUNT, width=width)
        self.num_layers, self.width = int(num_layers), int(width)

        self.head_conv = nn.Sequential(
            FP_Conv(3, width, kernel_size=3, stride=1, padding=1, bias=False, Nbits=None),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        blocks, in_chs = [], width
        for stage, out_chs in enumerate((width, 2 * width, 4 * width)):
            for block in range((num_layers - 2) // 6):
                strides = 2 if stage > 0 and block == 0 else 1
                blocks.append(
                    ResNet_Block(in_chs, out_chs, strides, Nbits, symmetric, quantizer)
                )
                in_chs = out_chs
        self.body_op = nn.Sequential(*blocks)
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.final_fc = FP_Linear(4 * width, 10, Nbits=None)

    @property
    def Nbits(self):
        """Bits of a weight of the stages, None for float; each layer's own can be set."""
        return self.body_op[0].conv1[0].Nbits

    def stage_layers(self):
        """Return [(name, layer)] of the stages' FP_Convs, in forward order: what Nbits applies to.

        Names are those within body_op: 0.conv1.0, ..., 8.conv2.0. The projections are among them.
        """
        return [(name, layer) for name, layer in self.body_op.named_modules()
                if isinstance(layer, FP_Conv)]

    def forward(self, x):
        return self.final_fc(self.avg_pool(self.body_op(self.head_conv(x))).flatten(1))
