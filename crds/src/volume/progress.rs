//! Work under way on copies, and the short texts that `kubectl get` prints.
//!
//! Nothing decides by these: they may lag (steps of 5 % or 10 s) and are written by the leader alone.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::Id;
use crate::schema::MOST;

/// A copy with work under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CopyProgress {
    /// The copy's id.
    pub copy: Id,
    /// Name of its StorageServer.
    #[schemars(length(max = 253))]
    pub server: String,
    /// Filling = pages come from a good copy; Settling = pages that may differ are made equal.
    pub work: CopyWork,
    /// Pages still to do.
    #[schemars(range(min = 0, max = MOST))]
    pub pages_left: i64,
    /// Pages that there were to do when the work began.
    #[schemars(range(min = 0, max = MOST))]
    pub pages_total: i64,
    /// Percent done, 0 to 100; 100 only when it is.
    #[schemars(range(min = 0, max = 100))]
    pub percent: i32,
    /// Bytes per second over the last few seconds; left out = not known yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = MOST))]
    pub bytes_per_second: Option<i64>,
    /// Seconds until it is done at that rate; left out = not known yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = MOST))]
    pub eta_seconds: Option<i64>,
}

/// What goes on with a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum CopyWork {
    /// Pages come from a good copy.
    Filling,
    /// Pages that may differ are made equal.
    Settling,
}

/// The state of a volume in short, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VolumeSummary {
    /// Copies that serve, of all that are wanted, over all groups, such as 3/4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    pub copies: Option<String>,
    /// Names of the nodes that use it, such as node-1 or node-1,node-2 (ro).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub attached: Option<String>,
    /// What goes on, such as serving, filling 1 copy, settling, or waiting for node-2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub doing: Option<String>,
    /// How far all copies are filled together, such as 42%; left out = nothing is being filled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 8))]
    pub filled: Option<String>,
    /// Names of the servers that hold it, group after group, such as node-1,node-2~ node-3!: ~ is being filled, ! has
    /// failed.
    #[serde(default, rename = "where", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 2048))]
    pub located: Option<String>,
    /// The copies that are being filled, with rate and time left, such as node-2 42% 118Mi/s 3m10s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub filling: Option<String>,
    /// What is wrong, in plain words; left out when nothing is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub message: Option<String>,
}
