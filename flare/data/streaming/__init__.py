"""Trains on corpora larger than the disk: the corpus is tokenized while the model trains.

``--streaming`` turns it on. The data takes this path on every host:

    source -> pieces -> workers -> segments -> lanes -> blocks on disk -> rows -> trainer

Words, and the file that defines each:

piece       A part of the corpus that can be read alone: 32 MiB of a .jsonl file, one archive, one shard (``pieces``).
survey      The one reading before the first step. It chooses the held-out documents (``held_out``).
worker      A process that tokenizes. It keeps its pieces open between two requests (``worker``).
segment     The tokens of about 2 million characters of one piece: one answer of a worker (``messages``).
lane        A queue of pieces. Each epoch permutes the pieces and deals them to at most 16 lanes (``lanes``).
            The lanes give one segment each in turn. So the order does not depend on which worker is faster.
block       ``--streaming_buffer_rows`` consecutive rows in a directory of their own (``blocks``). Rows are shuffled
            inside a block by (seed, block). An epoch ends its last block.
place       Where a block begins: for each lane the piece and row, and the lane whose turn it is (``position``).
            A checkpoint records the place of the block that the run is in. A resume makes that block again.
producer    One process per host, started by the first rank of the host. It starts the workers, merges the lanes,
            writes blocks and deletes blocks that the ranks have read (``producer``).
client      The first rank of a host talks to the producer. The other ranks wait for directories (``block_store``).
rows        What the trainer reads: rows by position in the run, each rank its own (``rows``).
mixture     Several data sets: each has a producer, blocks and a place of its own (``mixture``).

At most three blocks of tokens are on disk. docs/design.md gives the reasons for this design.
"""
