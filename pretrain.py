"""Pretrain an encoder: the `pretrain` stage, as a script that a launcher can start.

    python pretrain.py --config configs/demo.yaml                                       one process
    torchrun --nproc_per_node 2 pretrain.py --config configs/demo.yaml                  two
    accelerate launch --config_file launch/accelerate-cpu2.yaml pretrain.py --config configs/demo.yaml

All do what `bertpipe pretrain --config configs/demo.yaml` does. The corpus, the tokenizer and the shards must be
there: `bertpipe shards` makes the last of them.
"""

import sys

from bertpipe.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["pretrain", *sys.argv[1:]]))
