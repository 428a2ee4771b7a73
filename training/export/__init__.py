"""Use a registered version: plain files, adapter merged and checked; a conversation."""
