//! The specification's section `vm`, which chooses kernel and size of the virtual machine.
//!
//! Contract: a `config.json` without the section is parsed once. With one, the section is taken out first and parsed
//! by itself, because `oci-spec` knows neither `hwConfig` nor a section without a kernel.
//! Not here: whether the host allows the section (`rules.rs`).

use std::path::PathBuf;

use oci_spec::runtime::{Spec, VMHypervisor, VMImage};
use serde::Deserialize;
use serde_json::Value;

/// What `config.json` asks of the virtual machine.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct VmSection {
    /// The hypervisor to use.
    pub hypervisor: Option<VMHypervisor>,
    /// The kernel to boot.
    pub kernel: Option<VmKernel>,
    /// A root image to boot into.
    pub image: Option<VMImage>,
    /// The machine's size.
    pub hw_config: Option<HwConfig>,
}

/// `vm.kernel`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct VmKernel {
    /// An ELF image on the host, absolute.
    pub path: PathBuf,
    /// Words for its command line.
    #[serde(default)]
    pub parameters: Vec<String>,
    /// An initramfs on the host, absolute, in place of the host's configured one.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
}

/// `vm.hwConfig`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct HwConfig {
    /// Number of vCPUs.
    pub vcpus: Option<u32>,
    /// Memory in bytes.
    pub memory: Option<u64>,
    /// Nodes of a device tree to pass through, for Xen.
    pub dtdevs: Option<Value>,
    /// A device tree, for Xen.
    #[serde(rename = "deviceTree")]
    pub device_tree: Option<Value>,
    /// Interrupts to pass through, for Xen.
    pub irqs: Option<Value>,
    /// I/O memory to pass through, for Xen.
    pub iomems: Option<Value>,
}

/// Parses `config.json` into the specification without its section `vm`, and that section.
pub(super) fn parse(text: &[u8]) -> Result<(Spec, Option<VmSection>), serde_json::Error> {
    let mentions_vm = text.windows(4).any(|window| window == b"\"vm\"");
    if !mentions_vm {
        return Ok((serde_json::from_slice(text)?, None));
    }
    let mut value: Value = serde_json::from_slice(text)?;
    let section = value.as_object_mut().and_then(|object| object.remove("vm"));
    let section = section.filter(|section| !section.is_null());
    let vm = section.map(serde_json::from_value).transpose()?;
    Ok((serde_json::from_value(value)?, vm))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_section_is_taken_out_whole() {
        let text = r#"{"ociVersion":"1.3.0","vm":{"kernel":{"path":"/k","initrd":"/i"},
            "hwConfig":{"vcpus":2,"memory":134217728,"irqs":[5]}}}"#;
        let (spec, vm) = parse(text.as_bytes()).unwrap();
        assert_eq!(*spec.vm(), None);
        let vm = vm.unwrap();
        let kernel = vm.kernel.unwrap();
        assert_eq!(
            (kernel.path, kernel.initrd),
            ("/k".into(), Some("/i".into()))
        );
        let hw = vm.hw_config.unwrap();
        assert_eq!((hw.vcpus, hw.memory), (Some(2), Some(128 << 20)));
        assert!(hw.irqs.is_some() && hw.iomems.is_none());
    }

    #[test]
    fn a_value_that_merely_reads_vm_is_no_section() {
        let (spec, vm) = parse(br#"{"ociVersion":"1.0.2","hostname":"vm"}"#).unwrap();
        assert_eq!((spec.hostname().as_deref(), vm), (Some("vm"), None));
        assert_eq!(
            parse(br#"{"ociVersion":"1.0.2","vm":null}"#).unwrap().1,
            None
        );
    }

    #[test]
    fn a_section_of_the_wrong_shape_is_refused() {
        assert!(parse(br#"{"ociVersion":"1.0.2","vm":5}"#).is_err());
        assert!(parse(br#"{"ociVersion":"1.0.2","vm":{"hwConfig":{"vcpus":-1}}}"#).is_err());
    }
}
