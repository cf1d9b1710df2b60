"""What the server of tests/launch.py has imported when it forks: all that the command does, under its settings."""

# ruff: noqa: E402, F401, I001
from bertpipe.commands import quiet_libraries

quiet_libraries()

import bertpipe.cli
import bertpipe.pipeline
import bertpipe.train.pretrain
import transformers.models.bert
import tests.launch
