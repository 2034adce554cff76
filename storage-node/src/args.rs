//! The command line: what each flag means, and devices as `PATH[,option…]`.

use clap::{Args, Parser, Subcommand};
use lamina_protocol::ids::{ClusterId, ServerId};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

/// Lamina's storage server: keeps pages of volumes on disks and files.
#[derive(Debug, Parser)]
#[command(name = "lamina-storage-node", version, about)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve copies of volumes.
    #[command(after_help = SERVE_EXAMPLES)]
    Serve(Box<Serve>),
    /// Read devices of stopped servers: list and compare copies, rebuild a volume's bytes.
    #[command(after_help = INSPECT_EXAMPLES)]
    Inspect(Inspect),
}

const SERVE_EXAMPLES: &str = "Examples:
  One server with one file of 1 GiB, made when it is not there:
    lamina-storage-node serve --cluster 0123456789abcdef0123456789abcdef \\
        --device /var/lib/lamina/a.img,size=1GiB
  Two disks, one of which keeps 4 KiB whole without saying so:
    lamina-storage-node serve --cluster $ID --device /dev/disk/by-id/nvme-A \\
        --device /dev/disk/by-id/ata-B,atomic4k
  As a pod: devices come from the StorageServer object named after the node:
    lamina-storage-node serve --kubernetes --node $NODE_NAME --cluster $ID --advertise $POD_IP";

const INSPECT_EXAMPLES: &str = "Examples:
  What lies on a device of a stopped server:
    lamina-storage-node inspect /var/lib/lamina/a.img
  Compare the copies of all volumes, and rebuild one volume's bytes from two servers' files:
    lamina-storage-node inspect --volume $VOLUME --output volume.img a.img b.img";

/// Flags of `serve`.
#[derive(Debug, Args)]
pub struct Serve {
    /// Id of the Lamina installation, 32 hexadecimal digits; devices of another one are refused.
    #[arg(long, env = "LAMINA_CLUSTER", value_name = "ID")]
    pub cluster: ClusterId,
    /// Id of this server if it is known; devices of another server are refused. Left out = as the devices say, or minted
    /// when the first one is formatted.
    #[arg(long, env = "LAMINA_SERVER", value_name = "ID")]
    pub server: Option<ServerId>,
    /// Where block connections come in. Not encrypted, not authenticated: a trusted network only.
    #[arg(long, env = "LAMINA_LISTEN", default_value = "0.0.0.0:4700", value_name = "IP:PORT")]
    pub listen: SocketAddr,
    /// Where the leader's control connections come in.
    #[arg(long, env = "LAMINA_CONTROL", default_value = "0.0.0.0:4701", value_name = "IP:PORT")]
    pub control: SocketAddr,
    /// Where /metrics, /healthz and /readyz are.
    #[arg(long, env = "LAMINA_METRICS", default_value = "127.0.0.1:4791", value_name = "IP:PORT")]
    pub metrics: SocketAddr,
    /// Host or IP under which others reach this server. Left out = the address of --listen.
    #[arg(long, env = "LAMINA_ADVERTISE", value_name = "HOST")]
    pub advertise: Option<String>,
    /// A device: an absolute path and options, by commas: `size=64MiB…` makes a file of that size, `atomic4k` and
    /// `journaled` say whether it keeps 4 KiB whole at a power cut, `format` lets foreign content be overwritten.
    #[arg(long = "device", value_name = "PATH[,OPTION…]")]
    pub devices: Vec<DeviceSpec>,
    /// Take the devices from the StorageServer object named after the node, and show how they are there.
    #[arg(long, requires = "node", conflicts_with = "devices")]
    pub kubernetes: bool,
    /// Name of the Kubernetes node.
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node: Option<String>,
    /// Seconds that a stop waits for the leader to leave this server's copies out.
    #[arg(long, default_value_t = 25, value_name = "SECONDS")]
    pub leave_seconds: u64,
    /// How logs look. What is logged is chosen by the variable RUST_LOG, such as info (the default) or debug.
    #[arg(long, env = "LAMINA_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

/// How logs look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Flags of `inspect`.
#[derive(Debug, Args)]
pub struct Inspect {
    /// The map to go by, in the protocol's binary encoding. Left out = the newest that the devices keep.
    #[arg(long, value_name = "FILE")]
    pub map: Option<PathBuf>,
    /// The volume; needed when the devices hold several.
    #[arg(long, value_name = "ID")]
    pub volume: Option<lamina_protocol::ids::VolumeId>,
    /// Write the volume's bytes to this file. Refused if it exists.
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Devices and files of stopped servers.
    #[arg(required = true, value_name = "DEVICE")]
    pub devices: Vec<PathBuf>,
}

/// A device that the server may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSpec {
    /// Where it is.
    pub path: PathBuf,
    /// Whether it keeps 4 KiB whole; `None` = as it announces.
    pub atomic4k: Option<bool>,
    /// Foreign content may be overwritten.
    pub format: bool,
    /// Bytes of a file; `None` for block devices.
    pub size: Option<u64>,
}

/// Why a device on the command line is not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotADevice {
    /// The path does not start with a slash.
    #[error("the path of a device is absolute")]
    Relative,
    /// Not a size.
    #[error("a size is a number with B, KiB, MiB, GiB or TiB, such as 64MiB")]
    Size,
    /// Not an option.
    #[error("options are size=…, atomic4k, journaled, format")]
    Option,
}

impl FromStr for DeviceSpec {
    type Err = NotADevice;

    fn from_str(text: &str) -> Result<Self, NotADevice> {
        let mut words = text.split(',');
        let path = PathBuf::from(words.next().unwrap_or_default());
        if !path.is_absolute() {
            return Err(NotADevice::Relative);
        }
        let mut device = Self { path, atomic4k: None, format: false, size: None };
        for word in words {
            match word.split_once('=') {
                None if word == "atomic4k" => device.atomic4k = Some(true),
                None if word == "journaled" => device.atomic4k = Some(false),
                None if word == "format" => device.format = true,
                Some(("size", size)) => device.size = Some(bytes_of(size)?),
                _ => return Err(NotADevice::Option),
            }
        }
        Ok(device)
    }
}

fn bytes_of(text: &str) -> Result<u64, NotADevice> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().map_err(|_| NotADevice::Size)?;
    let shift = match &text[digits..] {
        "" | "B" => 0,
        "KiB" | "Ki" => 10,
        "MiB" | "Mi" => 20,
        "GiB" | "Gi" => 30,
        "TiB" | "Ti" => 40,
        _ => return Err(NotADevice::Size),
    };
    number.checked_mul(1 << shift).ok_or(NotADevice::Size)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_device_is_a_path_with_options() {
        let device: DeviceSpec = "/a/b,size=64MiB,atomic4k,format".parse().unwrap();
        let expected = DeviceSpec { path: "/a/b".into(), atomic4k: Some(true), format: true, size: Some(64 << 20) };
        assert_eq!(device, expected);
        assert_eq!("/a,journaled".parse::<DeviceSpec>().unwrap().atomic4k, Some(false));
        assert_eq!("a".parse::<DeviceSpec>(), Err(NotADevice::Relative));
        assert_eq!("/a,size=9XB".parse::<DeviceSpec>(), Err(NotADevice::Size));
        assert_eq!("/a,size=99999999999999TiB".parse::<DeviceSpec>(), Err(NotADevice::Size));
        assert_eq!("/a,color=red".parse::<DeviceSpec>(), Err(NotADevice::Option));
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
        let serve = ["x", "serve", "--cluster", "00000000000000000000000000000001"];
        assert!(Cli::try_parse_from(serve).is_ok());
        assert!(Cli::try_parse_from(serve.iter().chain(&["--kubernetes", "--device", "/a"])).is_err());
    }
}
