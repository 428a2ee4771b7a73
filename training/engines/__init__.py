"""Engines that shard training, behind one protocol: DeepSpeed ZeRO 0 to 3 and FSDP2; and the optimizers."""
