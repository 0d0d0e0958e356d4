// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// newDoctorCommand is `plimsoll doctor`. It fails when the default run is not possible on this host, with one line that
// says what to do.
func newDoctorCommand() *cobra.Command {
	var install bool
	var with []string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "what this host can and cannot do, and what to install",
		Long: `doctor tries what a run needs and prints what it found. Rules, links and namespaces are tried in a network namespace
that is gone afterwards; kernel modules that this loads stay loaded, and are printed.

With --install it installs the distribution's packages that are missing, and checks nothing else: on a terminal it shows
the line and asks, without one it shows the line and runs it as root, and with NO_INSTALL=1 it only shows the line.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if install {
				packages, err := packagesOf(with)
				if err != nil {
					return err
				}
				return installMissing(cmd.Context(), hostInstaller(cmd), packages)
			}
			bin, err := binaries()
			if err != nil {
				return err
			}
			findings := examine(cmd.Context(), bin, os.Geteuid() == 0)
			printFindings(cmd.OutOrStdout(), findings)
			if err := verdict(findings); err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), "\nThe default run is possible here: make bench")
			return err
		},
	}
	cmd.Flags().BoolVar(&install, "install", false, "install the distribution's packages that are missing")
	cmd.Flags().StringSliceVar(&with, "with", nil, "with --install: the packages of a set too (guest, node-image, generate, check)")
	return cmd
}

// hostInstaller is the installer for this host and the command's terminal.
func hostInstaller(cmd *cobra.Command) *installer {
	return &installer{
		in:  cmd.InOrStdin(),
		out: cmd.ErrOrStderr(),
		// The question goes to standard error, as standard output may be a pipe into a file.
		terminal:  term.IsTerminal(int(os.Stdin.Fd())) && term.IsTerminal(int(os.Stderr.Fd())),
		root:      os.Geteuid() == 0,
		sudo:      lookUp("sudo") != "",
		apt:       lookUp("apt-get") != "",
		noInstall: os.Getenv("NO_INSTALL") != "",
		run:       runCommand,
		services:  enabledServices,
	}
}

// binaries returns the folder with kube-apiserver, kube-proxy and etcd: the one that this program lies in.
func binaries() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find this program's folder: %w", err)
	}
	return filepath.Dir(self), nil
}

// installCure is what to do about missing packages.
const installCure = "plimsoll doctor --install"

// A state is what a check found.
type state string

const (
	has     state = "ok"
	lacks   state = "no"
	note    state = "note" // it works, and may disturb the figures or end a larger run
	unknown state = "?"    // it cannot be told, usually for want of root
)

// A finding is one line of the doctor's report.
type finding struct {
	what   string
	state  state
	detail string
	// cure is what to do; empty for what does not stand in the way of the default run.
	cure string
}

// printFindings writes one line each, aligned.
func printFindings(w io.Writer, findings []finding) {
	for _, f := range findings {
		fmt.Fprintf(w, "%-5s %-21s %s\n", f.state, f.what, f.detail)
	}
}

// verdict returns nil when nothing stands in the way of the default run, and otherwise an error of one line that names
// what does and the cures, each once.
func verdict(findings []finding) error {
	var whats, cures []string
	for _, f := range findings {
		if f.cure == "" {
			continue
		}
		whats = append(whats, f.what)
		if !slices.Contains(cures, f.cure) {
			cures = append(cures, f.cure)
		}
	}
	if whats == nil {
		return nil
	}
	return fmt.Errorf("the default run is not possible here for want of %s: %s", strings.Join(whats, ", "), strings.Join(cures, "; "))
}

// examine tries everything that root may, or that a user may, with the Kubernetes under test in the folder bin. It leaves
// nothing behind but the kernel modules that its last finding names.
func examine(ctx context.Context, bin string, root bool) []finding {
	modules := loadedModules()
	findings := examineHost(root)
	findings = append(findings, examineKernel(ctx, root)...)
	findings = append(findings, examineBinaries(ctx, bin)...)
	findings = append(findings, examineKind(ctx)...)
	findings = append(findings, examineGuests(ctx))
	findings = append(findings, examineNoise()...)

	if loaded := newModules(modules, loadedModules()); len(loaded) > 0 {
		findings = append(findings, finding{"modules", note,
			"trying this made the kernel load " + strings.Join(loaded, ", ") + "; they stay until the next boot or rmmod", ""})
	}
	return findings
}

// examineBinaries asks the Kubernetes under test for its versions.
func examineBinaries(ctx context.Context, bin string) []finding {
	var findings []finding
	for _, name := range []string{"kube-apiserver", "kube-proxy", "etcd"} {
		f := finding{what: name, state: has}
		var said strings.Builder
		path := filepath.Join(bin, name)
		switch err := runCommand(ctx, &said, []string{path, "--version"}); {
		case errors.Is(err, os.ErrNotExist):
			f.state, f.detail, f.cure = lacks, "not in "+bin, "make build"
		case err != nil:
			f.state, f.detail, f.cure = lacks, err.Error(), "remove "+path+" and make build"
		default:
			f.detail, _, _ = strings.Cut(said.String(), "\n")
		}
		findings = append(findings, f)
	}
	return findings
}
