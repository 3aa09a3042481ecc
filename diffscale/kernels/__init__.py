"""CPU kernels in C++ and the tuning of a process that computes on a CPU."""
