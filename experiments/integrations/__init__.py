"""NG+ inside other packages' own training: fairseq's and schnetpack's."""
