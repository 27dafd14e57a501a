"""What is measured beside accuracy: speed, sizes of files, other runtimes."""
