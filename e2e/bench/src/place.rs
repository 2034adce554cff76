//! Where a program runs: on the machine's loopback, or in a network namespace that the caller made and holds.
//!
//! Invariant: a namespace is named by the process that holds it, never by a name of its own, so that nothing of it is
//! left when that process ends.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;

/// Where a program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The process that holds the network namespace; `None` = the machine's own.
    holder: Option<u32>,
    address: IpAddr,
}

impl Place {
    /// The machine's own network, on loopback.
    pub const LOOPBACK: Self = Self { holder: None, address: IpAddr::V4(Ipv4Addr::LOCALHOST) };

    /// The network namespace of a process, with the address that a program there is reached under.
    #[must_use]
    pub fn held_by(holder: u32, address: IpAddr) -> Self {
        Self { holder: Some(holder), address }
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// A free port here.
    #[must_use]
    pub fn any_port(&self) -> SocketAddr {
        SocketAddr::new(self.address, 0)
    }

    /// The command that runs a program here.
    #[must_use]
    pub fn command(&self, program: &Path) -> Command {
        let Some(holder) = self.holder else { return Command::new(program) };
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{holder}/ns/net")).arg("--").arg(program);
        command
    }
}
