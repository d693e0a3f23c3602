"""`python -m ffcv_ssl COMMAND`: the command `ffcv-ssl`, for launchers that take a module.

torchrun --nproc_per_node 8 --max_restarts 3 -m ffcv_ssl train --config simclr
"""

import sys

from ffcv_ssl.command_line import main

if __name__ == "__main__":
    sys.exit(main())
