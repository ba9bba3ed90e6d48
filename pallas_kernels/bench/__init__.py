"""Timing of the kernels against their floors and against other libraries."""
