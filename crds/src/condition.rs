//! Conditions, in the shape that `kubectl wait` and people know.
//!
//! Invariant: `lastTransitionTime` changes only when `status` does ([`set_condition`]), so that an unchanged condition
//! writes nothing to the API.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::schema::MOST;

/// One thing that is so, is not so, or is not known, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// What it is about, in CamelCase, such as Placed, Available or Healthy.
    #[serde(rename = "type")]
    #[schemars(length(min = 1, max = 63), regex(pattern = "^[A-Z][A-Za-z0-9]*$"))]
    pub kind: String,
    /// True, False, or Unknown when it cannot be said now.
    pub status: ConditionStatus,
    /// Why, as one word in CamelCase for programs and filters.
    #[schemars(length(min = 1, max = 63), regex(pattern = "^[A-Z][A-Za-z0-9]*$"))]
    pub reason: String,
    /// Why, in plain words, naming what is missing or what to do.
    #[serde(default)]
    #[schemars(length(max = 4096), extend("default" = ""))]
    pub message: String,
    /// When status last changed.
    #[schemars(with = "String", extend("format" = "date-time", "maxLength" = 40))]
    pub last_transition_time: Time,
    /// The metadata.generation (Kubernetes' own count of changes of spec) that this condition speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = MOST))]
    pub observed_generation: Option<i64>,
}

/// Whether a condition holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum ConditionStatus {
    /// It holds.
    True,
    /// It does not.
    False,
    /// It cannot be said now.
    Unknown,
}

impl From<bool> for ConditionStatus {
    fn from(holds: bool) -> Self {
        if holds { Self::True } else { Self::False }
    }
}

/// Puts a condition in place of the one of its kind, or adds it. Returns whether anything but `observedGeneration` and
/// `lastTransitionTime` changed; the latter is kept while `status` stays the same.
pub fn set_condition(conditions: &mut Vec<Condition>, mut next: Condition) -> bool {
    let Some(old) = conditions.iter_mut().find(|c| c.kind == next.kind) else {
        conditions.push(next);
        return true;
    };
    if old.status == next.status {
        next.last_transition_time = old.last_transition_time.clone();
    }
    let changed = (old.status, &old.reason, &old.message) != (next.status, &next.reason, &next.message);
    *old = next;
    changed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn condition(status: ConditionStatus, message: &str, time: &str) -> Condition {
        serde_json::from_value(serde_json::json!({
            "type": "Placed", "status": status, "reason": "Because", "message": message, "lastTransitionTime": time,
        }))
        .unwrap()
    }

    #[test]
    fn the_transition_time_changes_only_with_the_status() {
        let (early, late) = ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z");
        let mut conditions = Vec::new();
        assert!(set_condition(&mut conditions, condition(ConditionStatus::False, "a", early)));
        assert!(!set_condition(&mut conditions, condition(ConditionStatus::False, "a", late)));
        assert!(set_condition(&mut conditions, condition(ConditionStatus::False, "b", late)));
        assert_eq!(conditions, [condition(ConditionStatus::False, "b", early)]);
        assert!(set_condition(&mut conditions, condition(ConditionStatus::True, "b", late)));
        assert_eq!(conditions, [condition(ConditionStatus::True, "b", late)]);
    }
}
