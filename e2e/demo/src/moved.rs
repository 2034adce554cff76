//! What fills moved to servers that came back: counted by the storage servers that gave it, read from their metrics
//! through the API server, as anybody who may look at pods can.
//!
//! Invariant: a count that fell began anew at zero, for its process was another one; nothing is subtracted from it then.

use std::collections::BTreeMap;
use std::fmt;

use lamina_cluster::Cluster;

use crate::kube::{self, KubeError, NAMESPACE};
use crate::objects::Volume;

/// Where storage servers show their metrics.
const PORT: u16 = 4791;

/// What each server has given for fills of one volume since its process began.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Given(BTreeMap<String, Moved>);

/// Requests for pages and bytes of data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Moved {
    /// Answered requests for a page.
    pub pages: u64,
    /// Bytes that these answers carried.
    pub bytes: u64,
}

impl Given {
    /// As all servers say now.
    ///
    /// # Errors
    /// kubectl fails, or a server shows no metrics.
    pub fn now(cluster: &Cluster, volume: &Volume) -> Result<Self, KubeError> {
        let pods = kube::pods(cluster, NAMESPACE, "app.kubernetes.io/component=storage-node")?;
        let read = pods.into_iter().map(|pod| {
            let name = pod.metadata.name;
            let path = format!("/api/v1/namespaces/{NAMESPACE}/pods/{name}:{PORT}/proxy/metrics");
            let text = cluster.kubectl(&["get", "--raw", &path])?;
            Ok((name, Moved::read(&text, &volume.status.volume_id)))
        });
        read.collect::<Result<_, KubeError>>().map(Self)
    }

    /// What was given between this and a later look.
    #[must_use]
    pub fn until(&self, later: &Self) -> Moved {
        let mut moved = Moved::default();
        for (pod, after) in &later.0 {
            let before = self.0.get(pod).copied().unwrap_or_default();
            moved.pages += after.pages.checked_sub(before.pages).unwrap_or(after.pages);
            moved.bytes += after.bytes.checked_sub(before.bytes).unwrap_or(after.bytes);
        }
        moved
    }
}

impl Moved {
    fn read(metrics: &str, volume: &str) -> Self {
        let sum = |name: &str| {
            let labels = |line: &&str| line.contains("op=\"Fill\"") && line.contains(&format!("volume=\"{volume}\""));
            let series = metrics.lines().filter(|line| line.starts_with(name)).filter(labels);
            series.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
        };
        Self { pages: sum("lamina_storage_requests_total{"), bytes: sum("lamina_storage_request_bytes_total{") }
    }

    /// In a line, against the size of the volume.
    #[must_use]
    pub fn against(&self, volume: &Volume) -> String {
        let size = volume.status.map.iter().flat_map(|map| &map.layers).map(|layer| layer.size).max().unwrap_or(0);
        let percent = self.bytes as f64 * 100.0 / (size.max(1) as f64);
        format!("{self} moved to it, {percent:.1} % of the volume's {} MiB", size >> 20)
    }
}

impl fmt::Display for Moved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages asked for, {:.1} MiB", self.pages, self.bytes as f64 / f64::from(1 << 20))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn fills_of_one_volume_are_counted_and_a_new_process_from_zero() {
        let text = "lamina_storage_requests_total{volume=\"v\",op=\"Fill\"} 3\n\
                    lamina_storage_requests_total{volume=\"w\",op=\"Fill\"} 50\n\
                    lamina_storage_requests_total{volume=\"v\",op=\"Read\"} 70\n\
                    lamina_storage_request_bytes_total{volume=\"v\",op=\"Fill\"} 3145728\n";
        let now = Moved::read(text, "v");
        assert_eq!(now, Moved { pages: 3, bytes: 3 << 20 });
        let given = |a: Moved, b: Moved| Given([("a".to_owned(), a), ("b".to_owned(), b)].into());
        let before = given(Moved { pages: 1, bytes: 1 << 20 }, Moved { pages: 9, bytes: 9 << 20 });
        let after = given(now, Moved { pages: 2, bytes: 2 << 20 });
        assert_eq!(before.until(&after), Moved { pages: 4, bytes: 4 << 20 });
        let mut volume: Volume = serde_json::from_str(r#"{"metadata": {"name": "v"}}"#).unwrap();
        let map = r#"{"placements": [], "layers": [{"size": 419430400}]}"#;
        volume.status.map = Some(serde_json::from_str(map).unwrap());
        assert_eq!(now.against(&volume), "3 pages asked for, 3.0 MiB moved to it, 0.8 % of the volume's 400 MiB");
    }
}
