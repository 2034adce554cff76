//! One of those that are compared: what the load goes to, and the processes whose CPU time counts.

use crate::load::Target;
use crate::process::{Program, cpu_time};
use anyhow::Result;
use std::sync::Arc;
use std::time::Duration;

/// One of those that are compared.
#[derive(Debug)]
pub struct Contender {
    /// For people.
    pub name: &'static str,
    /// What has to be known beside its numbers; may be empty.
    pub note: String,
    /// What the load goes to.
    pub target: Target,
    /// All of its processes; shared where several volumes stand on the same servers. None for the raw file.
    pub programs: Vec<Arc<Program>>,
}

impl Contender {
    /// CPU time of all its processes until now.
    ///
    /// # Errors
    /// One of them is gone.
    pub fn cpu_time(&self) -> Result<Duration> {
        self.programs.iter().map(|program| cpu_time(program.id())).sum()
    }
}
