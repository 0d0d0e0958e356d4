// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/scenarios/load"
)

// ServerCommand and ClientCommand are the hidden subcommands that this program runs as inside pods.
const (
	ServerCommand = "pod-server"
	ClientCommand = "pod-client"
)

// servicePort is the fleet's Service port, backendPort where the backend pods listen.
const (
	servicePort = 80
	backendPort = 8080
)

// siteLoad is a site's client and servers.
type siteLoad struct {
	processes []clusters.Process
	client    *load.Driver
	servers   []*load.Server
}

// startLoad starts the servers, waits until they listen, then starts the client.
func startLoad(ctx context.Context, s clusters.Site) (*siteLoad, error) {
	l := &siteLoad{}
	if err := l.start(ctx, s); err != nil {
		return nil, errors.Join(err, l.close(context.WithoutCancel(ctx)))
	}
	return l, nil
}

func (l *siteLoad) start(ctx context.Context, s clusters.Site) error {
	anyAt := func(port uint16) string { return netip.AddrPortFrom(netip.IPv4Unspecified(), port).String() }
	for _, pod := range s.Backends() {
		p, err := pod.Start(ctx, ServerCommand, "--name", pod.Name(),
			"--listen", anyAt(backendPort), "--identify", anyAt(streamBackendPort), "--datagram", anyAt(datagramBackendPort))
		if err != nil {
			return err
		}
		l.processes = append(l.processes, p)
		server := load.NewServer(p.Stdin(), p.Stdout())
		l.servers = append(l.servers, server)
		if _, err := server.Ready(ctx); err != nil {
			return fmt.Errorf("server in %s: %w", pod.Name(), err)
		}
	}
	p, err := s.Client().Start(ctx, ClientCommand)
	if err != nil {
		return err
	}
	l.processes = append(l.processes, p)
	l.client = load.NewDriver(p.Stdin(), p.Stdout())
	return nil
}

// overflows counts connections that found a server's accept queue full since the servers began: each is a connect that
// took a second for a reason that no mode has.
func (l *siteLoad) overflows(ctx context.Context) (int64, error) {
	var n int64
	for _, s := range l.servers {
		report, err := s.Report(ctx)
		if err != nil {
			return 0, err
		}
		n += report.Overflows
	}
	return n, nil
}

func (l *siteLoad) close(ctx context.Context) error {
	var errs []error
	for _, p := range l.processes {
		errs = append(errs, p.Close(ctx))
	}
	return errors.Join(errs...)
}
