"""What the flows are put together from: form, run directory, data stages, policies, messages."""
