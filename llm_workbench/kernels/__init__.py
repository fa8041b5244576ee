"Kernels as drop-in ops."
