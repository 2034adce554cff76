//! How a volume is to be used: CSI's capability, an open set of texts and numbers, as a closed type.
//!
//! Invariants: a mounted volume has one of the filesystems that this project makes; no filesystem of theirs is ever mounted
//! for writing on two nodes or beside a writer on another (ext4 and xfs know nothing of each other's caches); mount flags
//! never show in a log, CSI allows credentials in them.

use std::fmt;
use std::str::FromStr;

use tonic::Status;

use crate::v1;
use crate::v1::volume_capability as wire;

/// mount(2) takes its options in one page; also CSI's bound for all flags of a volume together, bytes.
const MAX_FLAGS_BYTES: usize = 4096;

/// A capability that can not be granted. All are the caller's mistake and INVALID_ARGUMENT: the same request will never do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CapabilityError {
    /// No capability at all.
    #[error("{field} is required")]
    Missing {
        /// As spelled in the .proto.
        field: &'static str,
    },
    /// Neither block nor mount.
    #[error("volume_capability.access_type is required: block or mount")]
    NoAccessType,
    /// No mode, or none that CSI 1.12 knows.
    #[error("volume_capability.access_mode is required and must be a mode of CSI 1.12")]
    NoAccessMode,
    /// A filesystem that this project does not make.
    #[error("volume_capability.mount.fs_type must be ext4, xfs or empty (ext4)")]
    UnknownFilesystem,
    /// A flag that mount(8) could not take as one option.
    #[error(
        "volume_capability.mount.mount_flags: a flag is empty or has blanks or control characters, or all have over 4096 bytes"
    )]
    BadFlag,
    /// Owners are the kubelet's business here: VOLUME_MOUNT_GROUP is not announced.
    #[error("volume_capability.mount.volume_mount_group is not supported")]
    MountGroup,
    /// A writer on one node beside another node that has the filesystem mounted would ruin it.
    #[error(
        "ext4 and xfs cannot be mounted on several nodes unless all only read: use a block volume or another access mode"
    )]
    SharedFilesystem,
}

impl From<CapabilityError> for Status {
    fn from(error: CapabilityError) -> Self {
        Status::invalid_argument(error.to_string())
    }
}

/// A filesystem that this project makes and grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Filesystem {
    /// What a caller gets who asks for none.
    #[default]
    Ext4,
    /// Grows online everywhere.
    Xfs,
}

impl Filesystem {
    /// As mount(8) and CSI spell it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }
}

impl FromStr for Filesystem {
    type Err = CapabilityError;

    /// Empty is the default.
    fn from_str(text: &str) -> Result<Self, CapabilityError> {
        match text {
            "" => Ok(Self::default()),
            "ext4" => Ok(Self::Ext4),
            "xfs" => Ok(Self::Xfs),
            _ => Err(CapabilityError::UnknownFilesystem),
        }
    }
}

impl fmt::Display for Filesystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Options for mount(8), in the caller's order. Their text is not shown by `Debug`.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct MountFlags(Vec<String>);

impl MountFlags {
    /// The options.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }

    fn parse(flags: &[String]) -> Result<Self, CapabilityError> {
        let total: usize = flags.iter().map(|flag| flag.len() + 1).sum();
        let blank = |letter: char| letter.is_control() || letter.is_whitespace();
        let bad = flags.iter().any(|flag| flag.is_empty() || flag.contains(blank));
        if bad || total > MAX_FLAGS_BYTES { Err(CapabilityError::BadFlag) } else { Ok(Self(flags.to_vec())) }
    }

    fn ask_for_read_only(&self) -> bool {
        self.iter().flat_map(|flag| flag.split(',')).any(|option| option == "ro")
    }
}

impl fmt::Debug for MountFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MountFlags(<{} not shown>)", self.0.len())
    }
}

/// What the consumer sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// A block device.
    Block,
    /// A mounted filesystem.
    Mount(Mount),
}

/// A filesystem and how it is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The one to make on a new volume and to expect on an old one.
    pub filesystem: Filesystem,
    /// Passed to mount(8).
    pub flags: MountFlags,
    /// The access mode or a flag asks for it; a request's own `readonly` comes on top.
    pub read_only: bool,
}

/// Who may use the volume at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AccessMode {
    /// One node, which may write; how many workloads there is not said.
    SingleNodeWriter,
    /// One node, which reads.
    SingleNodeReader,
    /// One workload on one node.
    SingleNodeSingleWriter,
    /// Several workloads on one node.
    SingleNodeMultiWriter,
    /// Several nodes, all read.
    MultiNodeReader,
    /// Several nodes, one writes.
    MultiNodeSingleWriter,
    /// Several nodes, all may write.
    MultiNodeMultiWriter,
}

impl AccessMode {
    /// Nobody writes.
    #[must_use]
    pub const fn read_only(self) -> bool {
        matches!(self, Self::SingleNodeReader | Self::MultiNodeReader)
    }

    /// More than one node may have the volume published.
    #[must_use]
    pub const fn several_nodes(self) -> bool {
        matches!(self, Self::MultiNodeReader | Self::MultiNodeSingleWriter | Self::MultiNodeMultiWriter)
    }

    /// A second target path on the node is FAILED_PRECONDITION.
    #[must_use]
    pub const fn single_workload(self) -> bool {
        matches!(self, Self::SingleNodeSingleWriter)
    }

    fn from_wire(mode: Option<&wire::AccessMode>) -> Result<Self, CapabilityError> {
        use wire::access_mode::Mode;
        let number = mode.ok_or(CapabilityError::NoAccessMode)?.mode;
        match Mode::try_from(number).map_err(|_| CapabilityError::NoAccessMode)? {
            Mode::Unknown => Err(CapabilityError::NoAccessMode),
            Mode::SingleNodeWriter => Ok(Self::SingleNodeWriter),
            Mode::SingleNodeReaderOnly => Ok(Self::SingleNodeReader),
            Mode::MultiNodeReaderOnly => Ok(Self::MultiNodeReader),
            Mode::MultiNodeSingleWriter => Ok(Self::MultiNodeSingleWriter),
            Mode::MultiNodeMultiWriter => Ok(Self::MultiNodeMultiWriter),
            Mode::SingleNodeSingleWriter => Ok(Self::SingleNodeSingleWriter),
            Mode::SingleNodeMultiWriter => Ok(Self::SingleNodeMultiWriter),
        }
    }
}

/// One way to use a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeUse {
    /// What the consumer sees.
    pub access: Access,
    /// Who else may see it at the same time.
    pub mode: AccessMode,
}

impl VolumeUse {
    /// Reads the one capability of a publish or stage request.
    ///
    /// # Errors
    /// [`CapabilityError`].
    pub fn parse(capability: Option<&v1::VolumeCapability>) -> Result<Self, CapabilityError> {
        let capability = capability.ok_or(CapabilityError::Missing { field: "volume_capability" })?;
        let access = capability.access_type.as_ref().ok_or(CapabilityError::NoAccessType)?;
        let mode = AccessMode::from_wire(capability.access_mode.as_ref())?;
        let access = match access {
            wire::AccessType::Block(_) => Access::Block,
            wire::AccessType::Mount(mount) => Access::Mount(parse_mount(mount, mode)?),
        };
        Ok(Self { access, mode })
    }

    /// Reads the capabilities that a new volume must have, or an old one is asked for; never none.
    ///
    /// # Errors
    /// [`CapabilityError`].
    pub fn parse_all(capabilities: &[v1::VolumeCapability]) -> Result<Vec<Self>, CapabilityError> {
        if capabilities.is_empty() {
            return Err(CapabilityError::Missing { field: "volume_capabilities" });
        }
        capabilities.iter().map(|capability| Self::parse(Some(capability))).collect()
    }

    /// Whether the consumer may only read, given the `readonly` of its request.
    #[must_use]
    pub fn read_only(&self, requested: bool) -> bool {
        let by_flag = matches!(&self.access, Access::Mount(mount) if mount.read_only);
        requested || by_flag || self.mode.read_only()
    }

    /// The filesystem, if it is to be mounted.
    #[must_use]
    pub fn filesystem(&self) -> Option<Filesystem> {
        match &self.access {
            Access::Block => None,
            Access::Mount(mount) => Some(mount.filesystem),
        }
    }
}

fn parse_mount(mount: &wire::MountVolume, mode: AccessMode) -> Result<Mount, CapabilityError> {
    if !mount.volume_mount_group.is_empty() {
        return Err(CapabilityError::MountGroup);
    }
    if mode.several_nodes() && !mode.read_only() {
        return Err(CapabilityError::SharedFilesystem);
    }
    let flags = MountFlags::parse(&mount.mount_flags)?;
    let read_only = mode.read_only() || flags.ask_for_read_only();
    Ok(Mount { filesystem: mount.fs_type.parse()?, flags, read_only })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::v1::volume_capability::access_mode::Mode;
    use tonic::Code;

    fn capability(access: wire::AccessType, mode: Mode) -> v1::VolumeCapability {
        let access_mode = Some(wire::AccessMode { mode: mode.into() });
        v1::VolumeCapability { access_mode, access_type: Some(access) }
    }

    fn mount(fs_type: &str, flags: &[&str], mode: Mode) -> v1::VolumeCapability {
        let mount_flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        let mount = wire::MountVolume { fs_type: fs_type.to_owned(), mount_flags, ..Default::default() };
        capability(wire::AccessType::Mount(mount), mode)
    }

    fn block(mode: Mode) -> v1::VolumeCapability {
        capability(wire::AccessType::Block(wire::BlockVolume {}), mode)
    }

    #[test]
    fn every_mode_keeps_its_meaning() {
        // mode, read only, several nodes, single workload
        for (mode, expect) in [
            (Mode::SingleNodeWriter, (false, false, false)),
            (Mode::SingleNodeReaderOnly, (true, false, false)),
            (Mode::MultiNodeReaderOnly, (true, true, false)),
            (Mode::MultiNodeSingleWriter, (false, true, false)),
            (Mode::MultiNodeMultiWriter, (false, true, false)),
            (Mode::SingleNodeSingleWriter, (false, false, true)),
            (Mode::SingleNodeMultiWriter, (false, false, false)),
        ] {
            let mode_read = VolumeUse::parse(Some(&block(mode))).unwrap().mode;
            let seen = (mode_read.read_only(), mode_read.several_nodes(), mode_read.single_workload());
            assert_eq!(seen, expect, "{mode:?}");
        }
    }

    #[test]
    fn a_filesystem_is_never_shared_with_a_writer() {
        for mode in [Mode::MultiNodeSingleWriter, Mode::MultiNodeMultiWriter] {
            let refused = VolumeUse::parse(Some(&mount("ext4", &[], mode))).unwrap_err();
            assert_eq!(refused, CapabilityError::SharedFilesystem);
            assert!(VolumeUse::parse(Some(&block(mode))).is_ok());
        }
        let readers = VolumeUse::parse(Some(&mount("xfs", &[], Mode::MultiNodeReaderOnly))).unwrap();
        assert!(readers.read_only(false));
    }

    #[test]
    fn an_unnamed_filesystem_is_ext4_and_a_foreign_one_is_refused() {
        let read = |fs| VolumeUse::parse(Some(&mount(fs, &[], Mode::SingleNodeWriter)));
        assert_eq!(read("").unwrap().filesystem(), Some(Filesystem::Ext4));
        assert_eq!(read("xfs").unwrap().filesystem(), Some(Filesystem::Xfs));
        assert_eq!(read("btrfs").unwrap_err(), CapabilityError::UnknownFilesystem);
        assert_eq!(VolumeUse::parse(Some(&block(Mode::SingleNodeWriter))).unwrap().filesystem(), None);
    }

    #[test]
    fn read_only_comes_from_mode_flag_or_request() {
        let read = |flags: &[&str], mode| VolumeUse::parse(Some(&mount("xfs", flags, mode))).unwrap();
        assert!(!read(&["noatime"], Mode::SingleNodeWriter).read_only(false));
        assert!(read(&[], Mode::SingleNodeWriter).read_only(true));
        assert!(read(&["noatime,ro"], Mode::SingleNodeWriter).read_only(false));
        assert!(read(&[], Mode::SingleNodeReaderOnly).read_only(false));
        assert!(!read(&["errors=remount-ro"], Mode::SingleNodeWriter).read_only(false));
    }

    #[test]
    fn an_incomplete_or_strange_capability_is_the_callers_mistake() {
        let no_type = v1::VolumeCapability { access_type: None, ..block(Mode::SingleNodeWriter) };
        let no_mode = v1::VolumeCapability { access_mode: None, ..block(Mode::SingleNodeWriter) };
        let mut strange = block(Mode::SingleNodeWriter);
        strange.access_mode = Some(wire::AccessMode { mode: 99 });
        let group = wire::MountVolume { volume_mount_group: "7".to_owned(), ..Default::default() };
        let group = capability(wire::AccessType::Mount(group), Mode::SingleNodeWriter);
        let flag = mount("xfs", &["a b"], Mode::SingleNodeWriter);
        let long = mount("xfs", &["a".repeat(MAX_FLAGS_BYTES).as_str()], Mode::SingleNodeWriter);
        for (bad, error) in [
            (Some(&no_type), CapabilityError::NoAccessType),
            (Some(&no_mode), CapabilityError::NoAccessMode),
            (Some(&strange), CapabilityError::NoAccessMode),
            (Some(&block(Mode::Unknown)), CapabilityError::NoAccessMode),
            (Some(&group), CapabilityError::MountGroup),
            (Some(&flag), CapabilityError::BadFlag),
            (Some(&long), CapabilityError::BadFlag),
            (None, CapabilityError::Missing { field: "volume_capability" }),
        ] {
            assert_eq!(VolumeUse::parse(bad), Err(error));
            assert_eq!(Status::from(error).code(), Code::InvalidArgument);
        }
        assert_eq!(VolumeUse::parse_all(&[]), Err(CapabilityError::Missing { field: "volume_capabilities" }));
    }

    #[test]
    fn mount_flags_never_show_in_a_log() {
        let wire = mount("xfs", &["password=hunter2"], Mode::SingleNodeWriter);
        let read = VolumeUse::parse(Some(&wire)).unwrap();
        for shown in [format!("{wire:?}"), format!("{read:?}"), format!("{read:#?}")] {
            assert!(!shown.contains("hunter2"), "{shown}");
        }
    }
}
