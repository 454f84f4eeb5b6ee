//! Generates the messages and the ttrpc service from `proto/agent.proto`, in pure Rust.

use std::{env, fs, path::PathBuf};
use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() {
    println!("cargo:rerun-if-changed=proto");
    Codegen::new()
        .input("proto/agent.proto")
        .include("proto")
        .rust_protobuf()
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .run()
        .expect("generate the agent API");
    // Generated files start with inner attributes, which `include!` does not take; modules by path do.
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("OUT_DIR is set by cargo"));
    let modules: String = ["agent", "agent_ttrpc"]
        .iter()
        .map(|m| format!("#[path = {:?}] pub mod {m};\n", out.join(format!("{m}.rs"))))
        .collect();
    fs::write(out.join("modules.rs"), modules).expect("write modules.rs");
}
