"""What pruning is worth in time: dense against pruned, interleaved, on models of real size."""
