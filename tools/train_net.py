#!/usr/bin/env python3
"""Trains or evaluates a detector.

    tools/train_net.py --config-file configs/ATSS_R_50_FPN_1x.yaml --num-gpus 8
    torchrun --nproc-per-node 8 tools/train_net.py --config-file configs/ATSS_R_50_FPN_1x.yaml
    tools/train_net.py --config-file configs/ATSS_R_18_FPN_small.yaml \\
        --register cells_train=train.json:images --register cells_val=val.json:images \\
        DATASETS.TRAIN "('cells_train',)" DATASETS.TEST "('cells_val',)"
    tools/train_net.py ... --register fish_train=data.yaml:train --register fish_val=data.yaml:val
"""

from atss.engine.run import make_parser, start

if __name__ == "__main__":
    start(make_parser(epilog=__doc__).parse_intermixed_args())
