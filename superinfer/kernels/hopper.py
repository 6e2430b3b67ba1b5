"""What a program may have of a Hopper's multiprocessor (CUDA programming guide, "Compute Capability 9.0")."""

SHARED_BYTES = 227 << 10  # of shared memory, at most
RESERVED_BYTES = 1 << 10  # more of it that the driver takes for each program
