"""Studies: what a method of this package gains on real data, against what it would have to beat."""
