//! The way to the database in a pod: its own address on a cluster of this machine, else a forwarded port.
//!
//! Invariant: the forwarding ends with the [`Door`]; nothing of it is left.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use lamina_cluster::Cluster;
use lamina_cluster::host::HostError;

use crate::kube::KubeError;
use crate::objects::Pod;

/// An address at which PostgreSQL answers, as long as this lives.
#[derive(Debug)]
pub struct Door {
    /// Host, or host and port.
    pub address: String,
    forward: Option<Child>,
}

impl Door {
    /// To a pod of the default namespace.
    ///
    /// # Errors
    /// kubectl does not forward a port.
    pub fn to(cluster: &Cluster, pod: &Pod) -> Result<Self, KubeError> {
        if cluster.is_own() {
            return Ok(Self { address: pod.status.pod_ip.clone(), forward: None });
        }
        let words = cluster.kubectl_words(&["port-forward", &format!("pod/{}", pod.metadata.name), ":5432"]);
        let failed = |source| HostError::Start { command: words.join(" "), source };
        let mut forward = Command::new(&words[0])
            .args(&words[1..])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            // It complains of every connection that the pod's move breaks.
            .stderr(Stdio::null())
            .spawn()
            .map_err(failed)?;
        let mut said = BufReader::new(forward.stdout.take().expect("piped above"));
        let mut line = String::new();
        let read = said.read_line(&mut line).map_err(failed);
        let mut door = Self { address: String::new(), forward: Some(forward) };
        read?;
        // It says a line for each connection, and ends when nobody listens.
        std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
        door.address = forwarded(&line).ok_or_else(|| KubeError::NoForward(pod.metadata.name.clone()))?.to_owned();
        Ok(door)
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        if let Some(forward) = &mut self.forward {
            forward.kill().ok();
            forward.wait().ok();
        }
    }
}

/// `Forwarding from 127.0.0.1:40001 -> 5432`.
fn forwarded(line: &str) -> Option<&str> {
    line.strip_prefix("Forwarding from ")?.split(' ').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubectls_word_of_a_forwarded_port_is_read() {
        assert_eq!(forwarded("Forwarding from 127.0.0.1:40001 -> 5432\n"), Some("127.0.0.1:40001"));
        assert_eq!(forwarded("error: no such pod\n"), None);
    }
}
