"""``python3 -m qemu_ioasid.agent ROLE [FD FD]``; also what the agent's disk starts with."""

import sys

from qemu_ioasid.agent.server import main

if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:4]))
