"""`make gpu-check`: what of this project works on the GPUs of this machine, how fast, beside published figures."""
