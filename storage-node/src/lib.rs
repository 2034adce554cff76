//! The storage server: pages on disk, comparator, sync bits, fills from peers.
//!
//! The program around two parts that decide: [`lamina_protocol::storage_server`] (what is answered) and [`store`] (where
//! bytes lie). Absent on purpose: any answer of its own to a block request.

pub mod args;
mod clock;
mod connections;
mod control;
mod devices;
mod events;
pub mod health;
mod inspect;
mod kubernetes;
mod link;
mod metrics;
mod peers;
mod rate;
mod serve;
mod server;
pub mod store;

pub use devices::{DeviceState, DeviceView};
pub use inspect::{InspectError, inspect};
pub use serve::{ServeError, serve};
