// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// A distroPackage is a package of Debian and Ubuntu, and how to see that what it is wanted for is there. That is a file
// and not the package's name, so a host that has the program from elsewhere is left alone.
type distroPackage struct {
	name string
	// wants are commands, or files by their absolute path.
	wants []string
	why   string
}

// A packageSet is asked for as a whole: `plimsoll doctor --install --with NAME`.
type packageSet struct {
	name     string
	packages []distroPackage
}

// packageSets are all that is asked of the distribution. None of these packages starts a daemon: nftables brings a
// service that stays disabled, which install verifies.
//
// Note: the conntrack tool is not among them: kube-proxy 1.36 deletes stale entries by netlink (pkg/proxy/conntrack).
var packageSets = []packageSet{
	{"run", []distroPackage{
		{"iptables", []string{"xtables-nft-multi", "xtables-legacy-multi"}, "kube-proxy in modes iptables and iptables-legacy"},
		{"nftables", []string{"nft"}, "kube-proxy in mode nftables, and the conntrack hooks of direct-conntrack"},
		{"ipset", []string{"ipset"}, "kube-proxy in mode ipvs"},
	}},
	{"generate", []distroPackage{
		{"clang-14", []string{"clang-14"}, "the BPF C; pinned, so that everybody generates the same bytes"},
		{"llvm-14", []string{"llvm-strip-14"}, "the BPF objects without their debugging sections"},
		{"libbpf-dev", []string{"/usr/include/bpf/bpf_helpers.h"}, "the helpers' declarations"},
		{"linux-libc-dev", []string{"/usr/include/linux/bpf.h"}, "the kernel's declarations"},
	}},
	{"node-image", []distroPackage{
		{"mmdebstrap", []string{"mmdebstrap"}, "the root file system of a node"},
		{"gcc", []string{"gcc"}, "runc, which enters namespaces by C code"},
		{"libc6-dev", []string{"/usr/include/stdlib.h"}, "the same"},
		{"libseccomp-dev", []string{"/usr/include/seccomp.h"}, "runc's filters of system calls"},
		{"pkgconf", []string{"pkg-config"}, "how runc finds them"},
	}},
	{"guest", []distroPackage{
		{"qemu-system-x86", []string{"qemu-system-x86_64"}, "the machines of guests, which count instructions"},
		{"kmod", []string{"kmod", "depmod"}, "the modules of their kernel"},
	}},
	{"check", []distroPackage{
		{"shellcheck", []string{"shellcheck"}, "the shell in .ci and in the workflow"},
		{"gcc", []string{"gcc"}, "the race detector"},
		{"libc6-dev", []string{"/usr/include/stdlib.h"}, "the race detector"},
	}},
}

// packagesOf returns the packages of the set run and of the named ones.
func packagesOf(names []string) ([]distroPackage, error) {
	var all []distroPackage
	for _, name := range append([]string{"run"}, names...) {
		i := slices.IndexFunc(packageSets, func(s packageSet) bool { return s.name == name })
		if i < 0 {
			var known []string
			for _, s := range packageSets {
				known = append(known, s.name)
			}
			return nil, fmt.Errorf("no set of packages is called %q: there are %s", name, strings.Join(known, ", "))
		}
		all = append(all, packageSets[i].packages...)
	}
	return all, nil
}

// missing returns the packages of which something is not on this host.
func missing(packages []distroPackage) []distroPackage {
	var out []distroPackage
	for _, p := range packages {
		if slices.ContainsFunc(p.wants, func(w string) bool { return lookUp(w) == "" }) {
			out = append(out, p)
		}
	}
	return out
}

// lookUp returns the path of a command, or of a file given by its absolute path; empty when it is not there. It looks in
// the system folders too, which a user's PATH often lacks.
func lookUp(name string) string {
	if filepath.IsAbs(name) {
		if _, err := os.Stat(name); err != nil {
			return ""
		}
		return name
	}
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path
		}
	}
	return ""
}

// An installer brings missing packages onto the host, after the rule: on a terminal the line is shown and asked for,
// without one it is shown and run as root, and with noInstall it is shown and nothing more.
type installer struct {
	in  io.Reader
	out io.Writer
	// terminal: somebody reads out and can answer on in.
	terminal  bool
	root      bool
	sudo      bool // sudo is on this host
	apt       bool // the distribution is Debian, Ubuntu or a child of theirs
	noInstall bool
	// run runs a command, with its output copied to out.
	run func(ctx context.Context, out io.Writer, argv []string) error
	// services lists what starts by itself on this host.
	services func() []string
}

// A consent is what the installer may do about missing packages.
type consent int

const (
	mayInstall consent = iota // at once
	mayAsk                    // when the answer allows it
	mayPrint                  // never: print the line
)

// consent says what may be done, and why when it is only to print.
func (i *installer) consent() (consent, string) {
	switch {
	case !i.apt:
		return mayPrint, "this distribution has no apt-get: install them with its own tool"
	case i.noInstall:
		return mayPrint, "NO_INSTALL is set"
	case !i.root && !i.sudo:
		return mayPrint, "installing needs root, and there is no sudo here"
	case i.terminal:
		return mayAsk, ""
	case !i.root:
		return mayPrint, "installing needs root, and there is no terminal to ask on"
	}
	return mayInstall, ""
}

// install brings the packages onto the host and returns once what they are wanted for is there. With none it does and
// prints nothing. An error is one line that says what to do; nothing was installed when it says so.
func (i *installer) install(ctx context.Context, packages []distroPackage) error {
	if len(packages) == 0 {
		return nil
	}
	names := make([]string, len(packages))
	for n, p := range packages {
		names[n] = p.name
		fmt.Fprintf(i.out, "missing: %-15s for %s\n", p.name, p.why)
	}
	// Set: no questions, no restart of services that need it (Ubuntu's needrestart), and patience with an unattended
	// upgrade that holds the lock on a machine that has just booted.
	argv := []string{"env", "DEBIAN_FRONTEND=noninteractive", "NEEDRESTART_SUSPEND=1",
		"apt-get", "-o", "DPkg::Lock::Timeout=300", "install", "-y", "-q", "--no-install-recommends"}
	update := []string{"apt-get", "-o", "DPkg::Lock::Timeout=300", "update", "-q"}
	if !i.root {
		argv, update = append([]string{"sudo"}, argv...), append([]string{"sudo"}, update...)
	}
	argv = append(argv, names...)
	line := strings.Join(argv, " ")

	may, why := i.consent()
	if may == mayPrint {
		if i.apt {
			fmt.Fprintln(i.out, line)
		}
		return fmt.Errorf("missing %s; nothing was installed: %s", strings.Join(names, ", "), why)
	}
	fmt.Fprintln(i.out, line)
	if may == mayAsk {
		yes, err := i.ask(ctx)
		if err != nil {
			return err
		}
		if !yes {
			return fmt.Errorf("missing %s; nothing was installed", strings.Join(names, ", "))
		}
	}

	before := i.services()
	// The lists of packages are fetched only where they are too old to name what is wanted.
	fresh := false
	if i.run(ctx, io.Discard, append([]string{"apt-cache", "show"}, names...)) != nil {
		if err := i.run(ctx, i.out, update); err != nil {
			return fmt.Errorf("fetch the lists of packages: %w (is there a network, and a mirror that answers?)", err)
		}
		fresh = true
	}
	err := i.run(ctx, i.out, argv)
	if err != nil && !fresh && ctx.Err() == nil {
		// The list may name a version that the mirror has dropped since.
		if err = i.run(ctx, i.out, update); err == nil {
			err = i.run(ctx, i.out, argv)
		}
	}
	if err != nil {
		return fmt.Errorf("install %s: %w (is there a network, and a mirror that answers?)", strings.Join(names, ", "), err)
	}
	if started := slices.DeleteFunc(i.services(), func(s string) bool { return slices.Contains(before, s) }); len(started) > 0 {
		return fmt.Errorf("installing %s made this host start %s, which plimsoll does not want: disable it with systemctl disable --now",
			strings.Join(names, ", "), strings.Join(started, ", "))
	}
	return nil
}

// ask waits for an answer; Enter means yes, and the end of input means no.
func (i *installer) ask(ctx context.Context) (bool, error) {
	fmt.Fprint(i.out, "Run this? [Y/n] ")
	answer := make(chan string, 1)
	// Subtle: a read of a terminal cannot be interrupted. It is left behind when ctx ends, and the program with it.
	go func() {
		line, err := bufio.NewReader(i.in).ReadString('\n')
		if err != nil {
			line = "no"
		}
		answer <- strings.ToLower(strings.TrimSpace(line))
	}()
	select {
	case <-ctx.Done():
		fmt.Fprintln(i.out)
		return false, ctx.Err()
	case a := <-answer:
		return a == "" || a == "y" || a == "yes", nil
	}
}

// runCommand runs argv with its output copied to out. The error carries argv and the line that says what went wrong.
func runCommand(ctx context.Context, out io.Writer, argv []string) error {
	var said bytes.Buffer
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdin = os.Stdin // sudo may want a password
	cmd.Stdout = io.MultiWriter(out, &said)
	cmd.Stderr = cmd.Stdout
	// A package manager is asked to stop, never killed: it would leave packages half installed.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w%s", strings.Join(argv, " "), err, lastComplaint(said.String()))
	}
	return nil
}

// lastComplaint returns ": " and the line of a command's output that tells most: the last one that calls itself an error,
// as those of apt and nft do, or else the last. It is empty for a command that said nothing.
func lastComplaint(output string) string {
	var last, complaint string
	for line := range strings.Lines(output) {
		if line = strings.TrimSpace(line); line != "" {
			last = line
		}
		if strings.HasPrefix(line, "E: ") || strings.Contains(line, "Error: ") {
			complaint = line
		}
	}
	if complaint == "" {
		complaint = last
	}
	if complaint == "" {
		return ""
	}
	return ": " + complaint
}

// enabledServices lists the services that systemd or SysV init starts on this host.
func enabledServices() []string {
	var names []string
	for _, pattern := range []string{"/etc/systemd/system/*.wants/*.service", "/etc/rc[2S].d/S*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			panic(err) // the patterns are constants
		}
		for _, path := range found {
			names = append(names, filepath.Base(path))
		}
	}
	return names
}

// installMissing installs what is missing of the packages, as the caller and the environment allow.
func installMissing(ctx context.Context, i *installer, packages []distroPackage) error {
	if err := i.install(ctx, missing(packages)); err != nil {
		return err
	}
	var errs []error
	for _, p := range missing(packages) {
		errs = append(errs, fmt.Errorf("%s is installed, but %s is not there", p.name, strings.Join(p.wants, " or ")))
	}
	return errors.Join(errs...)
}
