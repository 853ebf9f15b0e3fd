"""
A network interface whose packets leave late, or not at all: python slow_road.py SECONDS LOSS.

The router sends packets into the interface `slow0`; this process hands them back to it, in their order.
"""

import fcntl
import os
import random
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
LONGEST = 65_536


def main(delay_s: float, loss: float) -> None:
    road = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(road, TUNSETIFF, struct.pack("16sH", b"slow0", IFF_TUN | IFF_NO_PI))
    under_way: deque[tuple[float, bytes]] = deque()
    while True:
        wait = max(under_way[0][0] - time.monotonic(), 0.0) if under_way else None
        if select.select([road], [], [], wait)[0]:
            packet = os.read(road, LONGEST)
            if random.random() >= loss:
                under_way.append((time.monotonic() + delay_s, packet))
        while under_way and under_way[0][0] <= time.monotonic():
            os.write(road, under_way.popleft()[1])


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]))
