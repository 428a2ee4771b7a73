"""Look at prepared data: masks, lengths, packing, the story of one record. Nothing is changed."""
