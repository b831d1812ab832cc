//! THE table of architectures: the only file in which their names occur.
