// SPDX-License-Identifier: Apache-2.0

package load

import (
	"context"
	"errors"
	"net"
	"time"
)

// A SYN that no rule translates yet leaves an entry in the node's connection tracking that says so, for
// nf_conntrack_tcp_timeout_syn_sent (120 s). Whatever the rules have become, a connect that takes the same source port to the
// same address within that time matches the entry, goes out untranslated and is lost, and renews the entry. So Wait takes its
// source ports where the kernel never takes those of other connects from (net.ipv4.ip_local_port_range begins at 32768), and
// takes each once in firstWaitPort to lastWaitPort before it takes one again: at one attempt in 40 ms, after 400 s.
//
// Note: ephemeral ports were tried. One measured connect in a few million met such a port and timed out, two in one visit.
const (
	firstWaitPort = 20000
	lastWaitPort  = 29999
)

// waitPorts hands out the source ports of Wait. The zero value begins with the first.
type waitPorts struct{ taken int }

func (p *waitPorts) next() int {
	port := firstWaitPort + p.taken%(lastWaitPort-firstWaitPort+1)
	p.taken++
	return port
}

// wait connects to each address in turn until it accepts. Elapsed of the reply is when the last one did; Unsent counts the
// addresses that did not within the limit, Errors the attempts in between.
func wait(ctx context.Context, request Request, ports *waitPorts) (Reply, error) {
	reply := Reply{Began: time.Now()}
	cpu := processCPU()
	limited, cancel := context.WithTimeout(ctx, request.Limit)
	defer cancel()
	pause := time.NewTimer(0)
	defer pause.Stop()
	for i, address := range request.Addresses {
		if err := await(limited, address.String(), request, ports, pause, &reply); err != nil {
			reply.Unsent = int64(len(request.Addresses) - i)
			break
		}
		reply.Elapsed = time.Since(reply.Began)
		reply.Latencies = append(reply.Latencies, int64(reply.Elapsed))
	}
	reply.CPU = processCPU() - cpu
	return reply, ctx.Err()
}

// await returns nil once address has accepted a connection, or the context's error.
func await(ctx context.Context, address string, request Request, ports *waitPorts, pause *time.Timer, reply *Reply) error {
	for {
		dialer := net.Dialer{Timeout: request.Timeout, LocalAddr: &net.TCPAddr{Port: ports.next()}}
		c, err := dialer.DialContext(ctx, "tcp", address)
		if err == nil {
			err = errors.Join(c.(*net.TCPConn).SetLinger(0), c.Close())
		}
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		reply.count(errorName(err))
		pause.Reset(request.Pause)
		select {
		case <-pause.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
