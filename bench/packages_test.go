// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
)

var someMissing = []distroPackage{{name: "nftables", why: "mode nftables"}, {name: "ipset", why: "mode ipvs"}}

// aptHost is an installer on a host whose package manager is played by fail: it returns what each command ends with.
type aptHost struct {
	installer
	ran    []string // commands in order, joined by spaces
	output strings.Builder
}

func newAPTHost(answer string, fail func(line string, nth int) error) *aptHost {
	h := &aptHost{}
	h.installer = installer{
		in: strings.NewReader(answer), out: &h.output, apt: true,
		run: func(_ context.Context, _ io.Writer, argv []string) error {
			line := strings.Join(argv, " ")
			h.ran = append(h.ran, line)
			if fail == nil {
				return nil
			}
			return fail(line, len(h.ran))
		},
		services: func() []string { return nil },
	}
	return h
}

// installs counts the commands that install packages.
func (h *aptHost) installs() int {
	n := 0
	for _, line := range h.ran {
		if strings.Contains(line, " install ") {
			n++
		}
	}
	return n
}

func TestInstallAsksOnATerminalAndOnlyThere(t *testing.T) {
	for _, c := range []struct {
		name                      string
		terminal, root, sudo, off bool
		answer                    string
		asked, installed          bool
		says                      string // in the error
	}{
		{name: "terminal, root, Enter", terminal: true, root: true, answer: "\n", asked: true, installed: true},
		{name: "terminal, root, yes", terminal: true, root: true, answer: "Yes\n", asked: true, installed: true},
		{name: "terminal, root, no", terminal: true, root: true, answer: "n\n", asked: true, says: "nothing was installed"},
		{name: "terminal, root, end of input", terminal: true, root: true, answer: "", asked: true, says: "nothing was installed"},
		{name: "terminal, user with sudo, Enter", terminal: true, sudo: true, answer: "\n", asked: true, installed: true},
		{name: "terminal, user without sudo", terminal: true, answer: "\n", says: "needs root"},
		{name: "no terminal, root", root: true, installed: true},
		{name: "no terminal, user with sudo", sudo: true, says: "no terminal"},
		{name: "NO_INSTALL on a terminal", terminal: true, root: true, off: true, answer: "\n", says: "NO_INSTALL"},
		{name: "NO_INSTALL without one", root: true, off: true, says: "NO_INSTALL"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newAPTHost(c.answer, nil)
			h.terminal, h.root, h.sudo, h.noInstall = c.terminal, c.root, c.sudo, c.off
			err := h.install(t.Context(), someMissing)

			if c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
				t.Errorf("error is %v, want one that says %q", err, c.says)
			}
			if got := h.installs() == 1; got != c.installed {
				t.Errorf("installed is %v, want %v; ran %q", got, c.installed, h.ran)
			}
			said := h.output.String()
			if got := strings.Contains(said, "[Y/n]"); got != c.asked {
				t.Errorf("asked is %v, want %v; printed %q", got, c.asked, said)
			}
			if !strings.Contains(said, "apt-get") || !strings.Contains(said, "nftables ipset") {
				t.Errorf("the line to install with is not shown: %q", said)
			}
			if c.installed && !c.root && !slices.ContainsFunc(h.ran, func(l string) bool { return strings.HasPrefix(l, "sudo ") }) {
				t.Errorf("a user's install did not go through sudo: %q", h.ran)
			}
		})
	}
}

func TestInstallDoesNothingWhenNothingIsMissing(t *testing.T) {
	h := newAPTHost("", nil)
	if err := h.install(t.Context(), nil); err != nil || h.ran != nil || h.output.Len() > 0 {
		t.Errorf("error %v, ran %q, printed %q", err, h.ran, h.output.String())
	}
}

func TestInstallNamesPackagesOnOtherDistributions(t *testing.T) {
	h := newAPTHost("", nil)
	h.apt, h.root = false, true
	err := h.install(t.Context(), someMissing)
	if err == nil || !strings.Contains(err.Error(), "nftables, ipset") || h.ran != nil {
		t.Errorf("error %v, ran %q", err, h.ran)
	}
}

func TestInstallFetchesListsOnlyWhenNeeded(t *testing.T) {
	refused := errors.New("apt-get: exit status 100: E: Unable to fetch some archives")
	for _, c := range []struct {
		name    string
		fail    func(line string, nth int) error
		updates int
		says    string
	}{
		{"known packages", nil, 0, ""},
		{"unknown to the lists", func(line string, _ int) error {
			if strings.HasPrefix(line, "apt-cache") {
				return refused
			}
			return nil
		}, 1, ""},
		{"a version that is gone from the mirror", func(line string, nth int) error {
			if strings.Contains(line, " install ") && nth == 2 {
				return refused
			}
			return nil
		}, 1, ""},
		{"no network", func(line string, _ int) error {
			if strings.HasPrefix(line, "apt-cache") {
				return nil
			}
			return refused
		}, 1, "is there a network"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newAPTHost("", c.fail)
			h.root = true
			err := h.install(t.Context(), someMissing)
			if c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
				t.Errorf("error is %v, want one that says %q", err, c.says)
			}
			if err != nil && strings.Contains(err.Error(), "\n") {
				t.Errorf("the error is more than one line: %q", err)
			}
			updates := 0
			for _, line := range h.ran {
				if strings.Contains(line, " update ") {
					updates++
				}
			}
			if updates != c.updates {
				t.Errorf("%d updates, want %d: %q", updates, c.updates, h.ran)
			}
		})
	}
}

func TestInstallNoticesAServiceThatItWouldStart(t *testing.T) {
	h := newAPTHost("", nil)
	h.root = true
	h.services = func() []string {
		if h.installs() > 0 {
			return []string{"cron.service", "nftables.service"}
		}
		return []string{"cron.service"}
	}
	err := h.install(t.Context(), someMissing)
	if err == nil || !strings.Contains(err.Error(), "nftables.service") || strings.Contains(err.Error(), "cron.service") {
		t.Errorf("error is %v, want one that names nftables.service alone", err)
	}
}

func TestInstallEndsWithItsContextWhileAsking(t *testing.T) {
	answers, _ := io.Pipe() // nobody ever answers
	h := newAPTHost("", nil)
	h.in, h.root, h.terminal = answers, true, true
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := h.install(ctx, someMissing); !errors.Is(err, context.Canceled) || h.ran != nil {
		t.Errorf("error %v, ran %q", err, h.ran)
	}
}

func TestPackagesOf(t *testing.T) {
	all, err := packagesOf([]string{"generate", "check"})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"iptables", "nftables", "clang-14", "shellcheck"} {
		if !slices.ContainsFunc(all, func(p distroPackage) bool { return p.name == want }) {
			t.Errorf("%s is not among %v", want, all)
		}
	}
	if _, err := packagesOf([]string{"everything"}); err == nil || !strings.Contains(err.Error(), "run, generate, node-image, guest, check") {
		t.Errorf("error is %v, want one that names the sets", err)
	}
}

func TestMissingLooksForFilesNotNames(t *testing.T) {
	packages := []distroPackage{
		{name: "a shell under another name", wants: []string{"sh"}},
		{name: "a file", wants: []string{"/proc/self/status"}},
		{name: "half there", wants: []string{"sh", "plimsoll-no-such-command"}},
		{name: "gone", wants: []string{"/no/such/header.h"}},
	}
	var names []string
	for _, p := range missing(packages) {
		names = append(names, p.name)
	}
	if !slices.Equal(names, []string{"half there", "gone"}) {
		t.Errorf("missing %q", names)
	}
}

func TestRunCommandSaysWhatWentWrong(t *testing.T) {
	for _, c := range []struct{ script, want string }{
		{"echo Reading lists; echo 'E: Unable to locate package nosuch'; echo trailing; exit 100", "exit status 100: E: Unable to locate package nosuch"},
		{"echo one; echo two >&2; exit 3", "exit status 3: two"},
	} {
		err := runCommand(t.Context(), io.Discard, []string{"sh", "-c", c.script})
		if err == nil || !strings.HasSuffix(err.Error(), c.want) || !strings.HasPrefix(err.Error(), "sh -c ") {
			t.Errorf("error is %v, want argv, then %q", err, c.want)
		}
	}
}
