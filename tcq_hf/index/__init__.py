"""Images to codes, codes to a FAISS index, an index on a dataset."""
