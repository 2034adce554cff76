//! Lamina's volumes through their NBD export beside qemu-nbd, nbdkit and the raw file, under the same load in one run.
//!
//! Absolute figures are the machine's; what is compared are ratios within a round ([`figures`]). CPU time counts all
//! processes of a contender: for Lamina the operator, the storage servers and the export ([`contender`]).

pub mod contender;
pub mod figures;
pub mod floor;
pub mod idle;
pub mod lamina;
pub mod load;
pub mod peers;
pub mod place;
pub mod process;
pub mod replication;
pub mod report;
