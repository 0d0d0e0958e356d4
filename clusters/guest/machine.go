// SPDX-License-Identifier: Apache-2.0

// Package guest is a node with a kernel of its own, in a virtual machine of QEMU without KVM that counts instructions: each guest instruction takes
// one nanosecond of the guest's clock, nothing else takes any, and the same seed gives the same run to the last digit, however busy the host
// is.
//
// The same binary drives machines on the host, and is init in the guest. It needs no root.
package guest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/plimsoll-bench/plimsoll/clusters"
)

// emulator is QEMU's command.
const emulator = "qemu-system-x86_64"

// A Machine boots a kernel with an initramfs. Machines may run side by side.
type Machine struct {
	Kernel    Kernel
	Initramfs string
	// Memory is the guest's, in MiB.
	Memory int
	// Seed gives the guest its randomness: what RDRAND and the like answer there.
	Seed uint64
	// Arguments are more of the kernel's command line.
	Arguments string
	// Limit is how long a run may take by the host's clock. 0 is without a limit.
	Limit time.Duration
}

// QEMUVersion is the first line that QEMU says of itself. Errors wrap clusters.ErrNotSupported.
func QEMUVersion(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, emulator, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("guests need %s (plimsoll doctor --install --with guest): %w: %w", emulator, err, clusters.ErrNotSupported)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return line, nil
}

// The files of a run.
const (
	ConsoleFile = "console.txt"
	outFile     = "out.txt"
)

// Run boots the machine, has the guest do a job, and returns what it wrote. dir is a folder of its own for the console's text. An error of the
// job, or the end of the console's text where the guest hangs, panics or is out of memory, is in the error.
func (m Machine) Run(ctx context.Context, dir string, job []byte) ([]byte, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	console, out := filepath.Join(dir, ConsoleFile), filepath.Join(dir, outFile)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if m.Limit > 0 {
		ctx, cancel = context.WithTimeoutCause(ctx, m.Limit, fmt.Errorf("%w: not done within %v", clusters.ErrLate, m.Limit))
		defer cancel()
	}
	cmd := exec.CommandContext(ctx, emulator, m.args(console, out, job)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	said, err := cmd.CombinedOutput()
	if cause := context.Cause(ctx); cause != nil {
		return nil, fmt.Errorf("guest: %w%s", cause, tail(console))
	}
	if err != nil {
		return nil, fmt.Errorf("guest: %s: %w: %s", emulator, err, bytes.TrimSpace(said))
	}
	text, err := os.ReadFile(out)
	if err != nil {
		return nil, fmt.Errorf("guest: %w", err)
	}
	if err := os.Remove(out); err != nil {
		return nil, err
	}
	text, err = outcome(text)
	if errors.Is(err, errUnfinished) {
		err = fmt.Errorf("%w%s", err, tail(console))
	}
	if err != nil {
		return nil, fmt.Errorf("guest: %w", err)
	}
	return text, nil
}

// args are QEMU's. Without a network, disk or graphics nothing but the processor and its clock acts in the guest.
//
// Subtle: both serial ports go to files, whose writing never waits. A pipe that is full would, for as long as the host's scheduler likes.
// slab_nomerge has what a connect allocates come from pages that nothing but connects uses: how full a page is that it shares with a mode's
// proxy is the proxy's affair.
// "-cpu max" has RDRAND, which takes from the seed: without it the kernel collects its randomness by jitter, which takes as long again. Without
// ERMS and FSRM the kernel clears a page by 512 steps of "rep stosq", with them by 4,096 of "rep stosb", and QEMU counts each as an instruction.
func (m Machine) args(console, out string, job []byte) []string {
	return []string{
		"-M", "q35", "-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-smp", "1", "-m", strconv.Itoa(m.Memory), "-cpu", "max,-erms,-fsrm",
		"-seed", strconv.FormatUint(m.Seed, 10), "-rtc", "base=2026-01-01T00:00:00,clock=vm",
		"-kernel", m.Kernel.Image, "-initrd", m.Initramfs,
		"-append", "console=ttyS0 rdinit=/init nokaslr panic=-1 mitigations=off audit=0 slab_nomerge quiet " + strings.TrimSpace(m.Arguments+" "+jobVariable+"="+base64.RawURLEncoding.EncodeToString(job)),
		"-nodefaults", "-display", "none", "-no-reboot", "-serial", "file:" + console, "-serial", "file:" + out,
	}
}

// Recipe names what machines and their initramfs are made of, but for the kernel and the programs.
func (m Machine) Recipe() string {
	m.Kernel, m.Initramfs, m.Seed = Kernel{}, "", 0
	sum := sha256.Sum256(fmt.Append(nil, archiveVersion, m.args("", "", nil)))
	return hex.EncodeToString(sum[:4])
}

// tailLines is how many of a console's lines an error has.
const tailLines = 15

// fatal finds the line that says why a guest ended: the kernel's, or a Go program's.
var fatal = regexp.MustCompile(`(?m)^.*(Kernel panic|Out of memory|Oops|BUG:|fatal error:|^panic:).*$`)

// tail quotes the console from the line on that says why the guest ended, or its last lines where none does.
func tail(console string) string {
	b, err := os.ReadFile(console)
	text := strings.TrimSpace(strings.ReplaceAll(string(b), "\r", ""))
	if err != nil || text == "" {
		return "; its console is empty"
	}
	if at := fatal.FindStringIndex(text); at != nil {
		lines := strings.Split(text[at[0]:], "\n")
		return fmt.Sprintf("; %s says:\n%s", console, strings.Join(lines[:min(tailLines, len(lines))], "\n"))
	}
	lines := strings.Split(text, "\n")
	return fmt.Sprintf("; %s ends:\n%s", console, strings.Join(lines[max(0, len(lines)-tailLines):], "\n"))
}
