"""The operations of the kernel table, a module for each kind; what others compute is in `bench.gpu.peers`."""
