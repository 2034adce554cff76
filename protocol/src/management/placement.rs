//! Where copies go (PROTOCOL.md §2; seed 002 \[0031\]).
