"""Getting tokens: download, tokenise, write and check token shards. Needs no torch."""
